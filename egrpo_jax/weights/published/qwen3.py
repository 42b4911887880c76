"""Qwen3 as it is published by transformers, as far as a text encoder needs it: tensors, and config.json.

Published files are of `Qwen3ForCausalLM` and spell names with `model.` in front; those of a `Qwen3Model`, which
diffusers writes where it saves a Z-Image pipeline again, do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from egrpo_jax.models.qwen3 import Qwen3Config
from egrpo_jax.weights.configs import EVEN, POSITIVE, SIZE, Key, Published, list_of, nullable, one_of
from egrpo_jax.weights.layout import Layout, entry, for_layers, kernel

CLASS_NAME = "qwen3"
"""The `model_type` that `Qwen3ForCausalLM` and `Qwen3Model` share."""
PREFIX = "model."

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
KEYS: Mapping[str, Key] = MappingProxyType(
    {
        **dict.fromkeys(_SIZES, Key(SIZE)),
        "head_dim": Key(EVEN, 128),
        "hidden_act": Key(one_of("silu"), "silu"),
        "rms_norm_eps": Key(one_of(1e-6), 1e-6),
        "attention_bias": Key(one_of(False), False),
        "use_sliding_window": Key(one_of(False), False),
        "layer_types": Key(nullable(list_of(one_of("full_attention"))), None),
        "rope_theta": Key(nullable(POSITIVE), None),  # transformers 5 has it under rope_parameters
    }
)
"""The keys of config.json that say something about the states."""
ROPE_KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "rope_theta": Key(nullable(POSITIVE), None),
        **dict.fromkeys(("rope_type", "type"), Key(one_of("default"), "default")),
    }
)
"""The keys of its `rope_parameters`, or of `rope_scaling`, as these were called before."""

_LINEARS = (
    ("to_q", "self_attn.q_proj"),
    ("to_k", "self_attn.k_proj"),
    ("to_v", "self_attn.v_proj"),
    ("out", "self_attn.o_proj"),
    ("mlp_gate", "mlp.gate_proj"),
    ("mlp_in", "mlp.up_proj"),
    ("mlp_out", "mlp.down_proj"),
)
_NORMS = (
    ("attention_norm", "input_layernorm"),
    ("mlp_norm", "post_attention_layernorm"),
    ("norm_q", "self_attn.q_norm"),
    ("norm_k", "self_attn.k_norm"),
)


def name_prefix(names: Iterable[str]) -> str:
    """The prefix with which a file spells its tensors, of these `names`: `"model."` or `""`."""
    return PREFIX if any(name.startswith(PREFIX) for name in names) else ""


def qwen3_layout(num_layers: int, prefix: str = PREFIX) -> Layout:
    """The tensors up to and with layer `num_layers`; `prefix` is what stands before their names.

    For the states that `Qwen3` gives, `num_layers` is `max(layers)`: 298 tensors for FLUX.2-klein's.
    """
    layer = f"{prefix}layers.{{}}."
    block = (
        *(e for ours, name in _LINEARS for e in kernel(layer + name, f"blocks/{ours}")),
        *(entry(f"{layer}{name}.weight", f"blocks/{ours}/scale") for ours, name in _NORMS),
    )
    return (entry(f"{prefix}embed_tokens.weight", "tokens/embedding"), *for_layers(num_layers, block))


def ignored(config: Qwen3Config, num_layers: int) -> tuple[str, ...]:
    """Patterns of whole names that may be in a file and are not needed for the states after `num_layers` layers.

    They are the layers from there on, the norm at the end, and the head.
    """
    later = "|".join(map(str, range(num_layers, config.num_layers)))
    return rf"(model\.)?layers\.({later})\..*", r"(model\.)?norm\.weight", r"lm_head\.weight"


def config_from_transformers(published: Published) -> Qwen3Config:
    """The sizes that a config.json of a Qwen3 names; keys that say nothing about the states are ignored.

    Raises:
      UserError: a size is missing, or a value is not one that Qwen3 has.
    """
    keys = published.checked(KEYS)
    scaling, rope = (published.section(name).checked(ROPE_KEYS) for name in ("rope_scaling", "rope_parameters"))
    theta = scaling["rope_theta"] or rope["rope_theta"] or keys["rope_theta"]
    if theta is None:
        raise published.error("rope_theta", f"{POSITIVE.expected}, here or in rope_parameters")
    if keys["num_attention_heads"] % keys["num_key_value_heads"]:
        raise keys.error("num_key_value_heads", f"a divisor of num_attention_heads {keys['num_attention_heads']}")
    return Qwen3Config(
        vocab_size=keys["vocab_size"],
        width=keys["hidden_size"],
        num_layers=keys["num_hidden_layers"],
        num_heads=keys["num_attention_heads"],
        num_kv_heads=keys["num_key_value_heads"],
        head_dim=keys["head_dim"],
        mlp_dim=keys["intermediate_size"],
        theta=float(theta),
    )
