"""Small image-text towers in the manner of CLIP: an image trunk and a linear head over a sentence vector."""

from __future__ import annotations

import dataclasses
from typing import Literal

import chex
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from egrpo_jax.models.layers import normalise
from egrpo_jax.models.patches import patchify

# Both trunks end in a flattened grid, not in its mean: where something is tells a left arrow from a right one.


@dataclasses.dataclass(frozen=True)
class TowerConfig:
    """Kind and sizes of a tower; `width` is that of the trunk's first stage."""

    kind: Literal["conv", "mixer"]
    width: int
    embed_dim: int = 128


class ConvBlock(nn.Module):
    """A residual block of two 3x3 convolutions."""

    width: int

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        hidden = nn.Conv(self.width, (3, 3), name="conv_1")(nn.gelu(nn.LayerNorm()(x)))
        return x + nn.Conv(self.width, (3, 3), name="conv_2")(nn.gelu(nn.LayerNorm()(hidden)))


class ConvTower(nn.Module):
    """Images `[B, height, width, 3]` in [0, 1] to unit vectors `[B, embed_dim]`, by convolutions at strides 4 and 8."""

    width: int
    embed_dim: int

    @nn.compact
    def __call__(self, images: chex.Array) -> chex.Array:
        x = nn.Dense(self.width, name="stem")(patchify_grid(images * 2 - 1, 2))
        x = nn.Conv(2 * self.width, (3, 3), strides=2, name="down_1")(nn.gelu(x))
        x = ConvBlock(2 * self.width, name="block_1")(x)
        x = nn.Conv(4 * self.width, (3, 3), strides=2, name="down_2")(nn.gelu(nn.LayerNorm()(x)))
        x = ConvBlock(4 * self.width, name="block_2")(x)
        x = nn.gelu(nn.LayerNorm()(x)).reshape(x.shape[0], -1)
        return normalise(nn.Dense(self.embed_dim, name="out")(x))


class MixerBlock(nn.Module):
    """An MLP over tokens, then one over channels, both residual; tokens `[B, N, D]`."""

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        tokens, channels = x.shape[1:]
        mixed = nn.Dense(tokens, name="tokens_2")(
            nn.gelu(nn.Dense(2 * tokens, name="tokens_1")(nn.LayerNorm()(x).swapaxes(1, 2)))
        )
        x = x + mixed.swapaxes(1, 2)
        hidden = nn.gelu(nn.Dense(3 * channels, name="channels_1")(nn.LayerNorm()(x)))
        return x + nn.Dense(channels, name="channels_2")(hidden)


class MixerTower(nn.Module):
    """Images `[B, height, width, 3]` in [0, 1] to unit vectors `[B, embed_dim]`, by MLPs over patches of 8 pixels."""

    width: int
    embed_dim: int

    @nn.compact
    def __call__(self, images: chex.Array) -> chex.Array:
        x = nn.gelu(nn.Dense(self.width, name="stem")(patchify_grid(images * 2 - 1, 4)))
        x = nn.Dense(2 * self.width, name="merge")(patchify(x, 2))
        for index in range(4):
            x = MixerBlock(name=f"block_{index}")(x)
        return normalise(nn.Dense(self.embed_dim, name="out")(nn.LayerNorm()(x).reshape(x.shape[0], -1)))


def patchify_grid(images: chex.Array, patch: int) -> chex.Array:
    """`patchify` that keeps rows and columns: `[B, rows, columns, patch * patch * C]`."""
    batch, height, width, _ = images.shape
    return patchify(images, patch).reshape(batch, height // patch, width // patch, -1)


class Tower(nn.Module):
    """An image trunk, a linear text head and a learned logit scale; embeddings meet as cosines."""

    config: TowerConfig

    def setup(self) -> None:
        """Makes the trunk, the text head and the logit scale."""
        trunk = {"conv": ConvTower, "mixer": MixerTower}[self.config.kind]
        self.trunk = trunk(self.config.width, self.config.embed_dim)
        self.text_head = nn.Dense(self.config.embed_dim, use_bias=False)
        self.log_scale = self.param("log_scale", nn.initializers.constant(np.log(14.0)), ())

    def __call__(self, images: chex.Array, pooled: chex.Array) -> chex.Array:
        """Logits `[B, K]` of `images [B, height, width, 3]` against texts' pooled vectors `[K, P]`: scaled cosines."""
        return jnp.exp(self.log_scale) * self.encode_images(images) @ self.encode_text(pooled).T

    def encode_images(self, images: chex.Array) -> chex.Array:
        """Unit vectors `[B, embed_dim]` of `images [B, height, width, 3]` in [0, 1]."""
        chex.assert_rank(images, 4)
        return self.trunk(images)

    def encode_text(self, pooled: chex.Array) -> chex.Array:
        """Unit vectors `[B, embed_dim]` of the text encoder's pooled vectors `[B, P]`."""
        return normalise(self.text_head(pooled))
