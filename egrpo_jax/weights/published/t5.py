"""The encoder of T5 v1.1 as it is published by transformers: the tensors of `T5EncoderModel`, and its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from egrpo_jax.models.t5 import T5Config
from egrpo_jax.weights.configs import SIZE, Key, Published, one_of
from egrpo_jax.weights.layout import LINEAR, Layout, entry, for_layers

IGNORED = (r"encoder\.embed_tokens\.weight",)
"""Patterns of whole names that some files have and no parameter is in: a second copy of `shared.weight`."""

KEYS: Mapping[str, Key] = MappingProxyType(
    {
        **dict.fromkeys(("vocab_size", "d_model", "num_layers", "num_heads", "d_kv", "d_ff"), Key(SIZE)),
        "relative_attention_num_buckets": Key(SIZE),
        "relative_attention_max_distance": Key(SIZE, 128),
        "feed_forward_proj": Key(one_of("gated-gelu"), "relu"),  # T5 before v1.1 has the default
        "layer_norm_epsilon": Key(one_of(1e-6), 1e-6),
    }
)
"""The keys of config.json that say something about the encoder."""

_LINEARS = (
    ("to_q", "layer.0.SelfAttention.q"),
    ("to_k", "layer.0.SelfAttention.k"),
    ("to_v", "layer.0.SelfAttention.v"),
    ("out", "layer.0.SelfAttention.o"),
    ("mlp_gate", "layer.1.DenseReluDense.wi_0"),
    ("mlp_in", "layer.1.DenseReluDense.wi_1"),
    ("mlp_out", "layer.1.DenseReluDense.wo"),
)
_NORMS = (("attention_norm", "layer.0.layer_norm"), ("mlp_norm", "layer.1.layer_norm"))


def t5_layout(config: T5Config) -> Layout:
    """The tensors of an encoder of this size, 219 for XXL."""
    block = (
        *(entry(f"encoder.block.{{}}.{name}.weight", f"blocks/{ours}/kernel", form=LINEAR) for ours, name in _LINEARS),
        *(entry(f"encoder.block.{{}}.{name}.weight", f"blocks/{ours}/scale") for ours, name in _NORMS),
    )
    return (
        entry("shared.weight", "tokens/embedding"),
        entry("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias"),
        *for_layers(config.num_layers, block),
        entry("encoder.final_layer_norm.weight", "final_norm/scale"),
    )


def config_from_transformers(published: Published) -> T5Config:
    """The sizes that a config.json of a `T5EncoderModel` names; keys that say nothing about them are ignored.

    Raises:
      UserError: a size is missing, or a value is not one that T5 v1.1 has.
    """
    keys = published.checked(KEYS)
    buckets, distance = keys["relative_attention_num_buckets"], keys["relative_attention_max_distance"]
    exact = buckets // 4  # distances on either side that have a bucket each
    if not exact:
        raise keys.error("relative_attention_num_buckets", "at least 4")
    if distance <= exact:
        raise keys.error("relative_attention_max_distance", f"above {exact}, a quarter of the buckets")
    return T5Config(
        vocab_size=keys["vocab_size"],
        width=keys["d_model"],
        num_layers=keys["num_layers"],
        num_heads=keys["num_heads"],
        head_dim=keys["d_kv"],
        mlp_dim=keys["d_ff"],
        num_buckets=buckets,
        max_distance=distance,
    )
