"""A small transformer text encoder: a short prompt to token states and one sentence vector."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import chex
import flax.linen as nn
import jax.numpy as jnp

from egrpo_jax.models.attention import attention
from egrpo_jax.models.layers import normalise

PAD_ID = 0


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the text encoder."""

    vocab_size: int
    length: int = 8
    width: int = 192
    num_layers: int = 2
    num_heads: int = 6
    pooled_dim: int = 384


class TextFeatures(NamedTuple):
    """Token states `[B, L, width]`, zero at padding, and pooled vectors `[B, pooled_dim]` of unit length."""

    states: chex.Array
    pooled: chex.Array


class TextBlock(nn.Module):
    """A pre-norm transformer block that does not attend to padding."""

    config: TextEncoderConfig

    @nn.compact
    def __call__(self, x: chex.Array, mask: chex.Array) -> chex.Array:
        width, heads = self.config.width, self.config.num_heads
        query, key, value = jnp.split(nn.Dense(3 * width, name="qkv")(nn.LayerNorm()(x)), 3, axis=-1)
        query, key, value = (part.reshape(*x.shape[:2], heads, -1) for part in (query, key, value))
        mixed = attention(query, key, value, mask[:, None, None, :]).reshape(x.shape)
        x = x + nn.Dense(width, name="out")(mixed)
        hidden = nn.gelu(nn.Dense(4 * width, name="ff_1")(nn.LayerNorm()(x)))
        return x + nn.Dense(width, name="ff_2")(hidden)


class TextEncoder(nn.Module):
    """Token ids `[B, L]`, padded with `PAD_ID`, to `TextFeatures`."""

    config: TextEncoderConfig

    @nn.compact
    def __call__(self, ids: chex.Array) -> TextFeatures:
        config = self.config
        chex.assert_shape(ids, (None, config.length))
        mask = ids != PAD_ID
        x = nn.Embed(config.vocab_size, config.width, name="tokens")(ids)
        x = x + self.param("positions", nn.initializers.normal(0.02), (config.length, config.width))
        for index in range(config.num_layers):
            x = TextBlock(config, name=f"block_{index}")(x, mask)
        states = nn.LayerNorm(name="norm")(x) * mask[..., None]
        mean = states.sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)
        return TextFeatures(states, normalise(nn.Dense(config.pooled_dim, name="pool")(mean)))
