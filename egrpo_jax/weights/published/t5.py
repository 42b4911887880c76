"""The encoder of T5 v1.1 as it is published by transformers: the tensors of `T5EncoderModel`, and its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.t5 import T5Config
from egrpo_jax.weights.layout import LINEAR, Layout, entry, for_layers

IGNORED = (r"encoder\.embed_tokens\.weight",)
"""Patterns of whole names that some files have and no parameter is in: a second copy of `shared.weight`."""

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


def config_from_transformers(published: Mapping[str, Any]) -> T5Config:
    """The sizes that a config.json of a `T5EncoderModel` names; keys that say nothing about them are ignored.

    Raises:
      UserError: a size is missing, or a value is not one that T5 v1.1 has.
    """
    feed_forward = published.get("feed_forward_proj", "relu")
    if feed_forward != "gated-gelu":
        raise UserError(f"config.json: feed_forward_proj is {feed_forward!r}; T5 v1.1 has 'gated-gelu'")
    if published.get("layer_norm_epsilon", 1e-6) != 1e-6:
        raise UserError(f"config.json: layer_norm_epsilon is {published['layer_norm_epsilon']}; T5 has 1e-06")
    try:
        return T5Config(
            vocab_size=published["vocab_size"],
            width=published["d_model"],
            num_layers=published["num_layers"],
            num_heads=published["num_heads"],
            head_dim=published["d_kv"],
            mlp_dim=published["d_ff"],
            num_buckets=published["relative_attention_num_buckets"],
            max_distance=published.get("relative_attention_max_distance", 128),
        )
    except KeyError as error:
        raise UserError(f"config.json: {error.args[0]} is missing; a T5EncoderModel's has it") from None
