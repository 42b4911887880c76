"""CLIP's text encoder as it is published by transformers: the tensors of `CLIPTextModel`, and its config.json.

Published files spell names with `text_model.` in front; those that transformers 5 writes do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from egrpo_jax.errors import UserError
from egrpo_jax.models.clip import ACTIVATIONS, ClipTextConfig, TransformerConfig
from egrpo_jax.weights.layout import Layout, entry, for_layers, linear

PREFIX = "text_model."
IGNORED = (r"(text_model\.)?embeddings\.position_ids",)
"""Patterns of whole names that older files have and no parameter is in: the numbers 0 to 76."""

_LEGACY_EOS_ID = 2  # in configs that mean the position of the highest id

_LINEARS = (
    ("to_q", "self_attn.q_proj"),
    ("to_k", "self_attn.k_proj"),
    ("to_v", "self_attn.v_proj"),
    ("out", "self_attn.out_proj"),
    ("mlp_1", "mlp.fc1"),
    ("mlp_2", "mlp.fc2"),
)
_NORMS = (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2"))


def text_prefix(names: Iterable[str]) -> str:
    """How a file spells its tensors: `"text_model."` or `""`, whatever stands before their names."""
    return PREFIX if any(name.startswith(PREFIX) for name in names) else ""


def clip_text_layout(config: ClipTextConfig, prefix: str = PREFIX) -> Layout:
    """The tensors of a text encoder of this size, 196 for CLIP-L; `prefix` is what stands before their names."""
    return (
        entry(f"{prefix}embeddings.token_embedding.weight", "tokens/embedding"),
        entry(f"{prefix}embeddings.position_embedding.weight", "positions"),
        *for_layers(config.transformer.num_layers, _block(f"{prefix}encoder.layers.{{}}.", "transformer/blocks/")),
        *_norm(f"{prefix}final_layer_norm", "final_norm"),
    )


def _block(prefix: str, folder: str) -> Layout:
    linears = (e for ours, name in _LINEARS for e in linear(prefix + name, folder + ours))
    norms = (e for ours, name in _NORMS for e in _norm(prefix + name, folder + ours))
    return (*linears, *norms)


def _norm(name: str, path: str) -> Layout:
    return entry(f"{name}.weight", f"{path}/scale"), entry(f"{name}.bias", f"{path}/bias")


def text_config_from_transformers(published: Mapping[str, Any]) -> ClipTextConfig:
    """The sizes that a config.json of a `CLIPTextModel` names; keys that say nothing about them are ignored.

    Raises:
      UserError: a size is missing, or a value is not one that a CLIP has.
    """
    activation = published.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"config.json: hidden_act is {activation!r}; CLIP has one of {', '.join(ACTIVATIONS)}")
    if published.get("layer_norm_eps", 1e-5) != 1e-5:
        raise UserError(f"config.json: layer_norm_eps is {published['layer_norm_eps']}; CLIP has 1e-05")
    eos_id = published.get("eos_token_id", _LEGACY_EOS_ID)
    try:
        return ClipTextConfig(
            transformer=TransformerConfig(
                width=published["hidden_size"],
                num_layers=published["num_hidden_layers"],
                num_heads=published["num_attention_heads"],
                mlp_dim=published["intermediate_size"],
                activation=activation,
            ),
            vocab_size=published["vocab_size"],
            length=published["max_position_embeddings"],
            eos_id=None if eos_id == _LEGACY_EOS_ID else eos_id,
        )
    except KeyError as error:
        raise UserError(f"config.json: {error.args[0]} is missing; a CLIPTextModel's has it") from None
