"""The FLUX.1 flow transformer (Black Forest Labs) as a pure Flax Linen module.

Image tokens and text tokens pass through `num_double_blocks` blocks with separate weights and joint attention, then,
concatenated as [text, image], through `num_single_blocks` blocks with shared weights. Every block is modulated by
one vector made of the time, the pooled text and, for guidance-distilled models, the guidance scale.
The blocks of each kind are scanned: compile time does not grow with depth, and parameters carry a leading layer axis.
"""

from __future__ import annotations

import dataclasses

import chex
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from egrpo_jax.models.attention import Backend, rope_table
from egrpo_jax.models.layers import (
    QKV,
    TIME_FEATURES,
    Dtype,
    Embedder,
    FeedForward,
    Linear,
    Modulation,
    Remat,
    gelu,
    modulate,
    rotate_and_attend,
    scan_blocks,
    sinusoid,
)


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Sizes of a FLUX transformer; the defaults are FLUX.1-dev (11,901,408,320 parameters)."""

    in_channels: int = 64
    num_double_blocks: int = 19
    num_single_blocks: int = 38
    num_heads: int = 24
    head_dim: int = 128
    text_dim: int = 4096
    pooled_dim: int = 768
    guidance_embed: bool = True
    axes_dims: tuple[int, int, int] = (16, 56, 56)
    theta: float = 10_000.0
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        if sum(self.axes_dims) != self.head_dim:
            raise ValueError(f"axes_dims {self.axes_dims} must add up to head_dim {self.head_dim}")

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.num_heads * self.head_dim


def forward_flops(config: FluxConfig, image_tokens: int, text_tokens: int) -> int:
    """Floating-point operations of one sample's velocity: its matrix products, a multiply-add being two.

    FLUX.1-dev with 512 text tokens: 21.5, 37.3 and 74.4 TFLOP at 512, 720 and 1024 pixels square.
    """
    width, tokens = config.width, image_tokens + text_tokens
    blocks = config.num_double_blocks + config.num_single_blocks
    per_token = (4 + 2 * config.mlp_ratio) * width**2  # qkv, out and the feed-forward, alike in both kinds of blocks
    modulations = (12 * config.num_double_blocks + 3 * config.num_single_blocks + 2) * width**2
    embedders = (1 + config.guidance_embed) * (TIME_FEATURES + width) + config.pooled_dim + width
    ends = 2 * image_tokens * config.in_channels + text_tokens * config.text_dim
    attention_products = 2 * width * tokens**2
    return 2 * (blocks * (per_token * tokens + attention_products) + modulations + (embedders + ends) * width)


def position_ids(text_tokens: int, grid: tuple[int, int]) -> np.ndarray:
    """Positions `[text_tokens + rows * columns, 3]`: zeros for text, then (0, row, column), row-major."""
    rows, columns = np.indices(grid).reshape(2, -1)
    image = np.stack([np.zeros_like(rows), rows, columns], axis=-1)
    return np.concatenate([np.zeros((text_tokens, 3), image.dtype), image])


class DoubleBlock(nn.Module):
    """A block with separate weights for image and text, attending jointly."""

    config: FluxConfig
    dtype: Dtype
    param_dtype: Dtype
    attention: Backend = "auto"

    @nn.compact
    def __call__(
        self,
        streams: tuple[chex.Array, chex.Array],
        vector: chex.Array,
        rope: tuple[chex.Array, chex.Array],
    ) -> tuple[tuple[chex.Array, chex.Array], None]:
        image, text = streams
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width, heads = self.config.width, (self.config.num_heads, self.config.head_dim)
        image_mod = Modulation(6, width, name="image_modulation", **common)(vector)
        text_mod = Modulation(6, width, name="text_modulation", **common)(vector)

        image_qkv = QKV(*heads, name="image_qkv", **common)(modulate(image, image_mod[0], image_mod[1]))
        text_qkv = QKV(*heads, name="text_qkv", **common)(modulate(text, text_mod[0], text_mod[1]))
        query, key, value = (jnp.concatenate(pair, axis=1) for pair in zip(text_qkv, image_qkv, strict=True))
        mixed = rotate_and_attend(query, key, value, rope, self.attention)
        text_mixed, image_mixed = jnp.split(mixed, [text.shape[1]], axis=1)

        image = image + image_mod[2] * Linear(width, name="image_out", **common)(image_mixed)
        text = text + text_mod[2] * Linear(width, name="text_out", **common)(text_mixed)
        image_ff = FeedForward(self.config.mlp_ratio * width, name="image_ff", **common)
        text_ff = FeedForward(self.config.mlp_ratio * width, name="text_ff", **common)
        image = image + image_mod[5] * image_ff(modulate(image, image_mod[3], image_mod[4]))
        text = text + text_mod[5] * text_ff(modulate(text, text_mod[3], text_mod[4]))
        return (image, text), None


class SingleBlock(nn.Module):
    """A block over the joint sequence, attention and feed-forward in parallel."""

    config: FluxConfig
    dtype: Dtype
    param_dtype: Dtype
    attention: Backend = "auto"

    @nn.compact
    def __call__(
        self, x: chex.Array, vector: chex.Array, rope: tuple[chex.Array, chex.Array]
    ) -> tuple[chex.Array, None]:
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        config, width = self.config, self.config.width
        shift, scale, gate = Modulation(3, width, name="modulation", **common)(vector)
        hidden = modulate(x, shift, scale)
        query, key, value = QKV(config.num_heads, config.head_dim, name="qkv", **common)(hidden)
        mixed = rotate_and_attend(query, key, value, rope, self.attention)
        mlp = gelu(Linear(config.mlp_ratio * width, name="mlp", **common)(hidden))
        joined = jnp.concatenate([mixed, mlp], axis=-1)
        return x + gate * Linear(width, name="out", **common)(joined), None


class Flux(nn.Module):
    """Velocity of a FLUX.1 flow model.

    Attributes:
      config: the sizes.
      dtype: what it computes in; the velocity is returned in float32.
      param_dtype: what the parameters are stored in.
      unroll: blocks in one trip of the scan; more compile longer, and run faster where a model is small.
      remat: what the backward pass computes again: `none` keeps every intermediate array; `projections` keeps the
        outputs of linear layers and of attention; `blocks` keeps the inputs of blocks alone.
      attention: what computes attention.
    """

    config: FluxConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    unroll: int = 1
    remat: Remat = "none"
    attention: Backend = "auto"

    @nn.compact
    def __call__(
        self,
        latents: chex.Array,
        time: chex.Array,
        text: chex.Array,
        pooled: chex.Array,
        guidance: chex.Array | None = None,
        *,
        grid: tuple[int, int],
    ) -> chex.Array:
        """Predicts `noise - data`.

        Args:
          latents: packed image tokens `[B, N, in_channels]`, row-major over `grid`.
          time: `[B]` in [0, 1], 1 is pure noise.
          text: text tokens `[B, L, text_dim]`; attended to without a mask.
          pooled: pooled text `[B, pooled_dim]`.
          guidance: guidance scale `[B]`, exactly if `config.guidance_embed`.
          grid: rows and columns of image tokens; their product is N.

        Returns:
          The velocity `[B, N, in_channels]`, float32.

        Raises:
          ValueError: guidance is given to a model without its embedder, or not to one with it.
        """
        config = self.config
        chex.assert_shape(latents, (None, grid[0] * grid[1], config.in_channels))
        chex.assert_shape(text, (latents.shape[0], None, config.text_dim))
        if (guidance is not None) != config.guidance_embed:
            raise ValueError(f"guidance_embed is {config.guidance_embed}, but guidance is {guidance}")
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        vector = self._conditioning_vector(time, pooled, guidance)
        rope = rope_table(position_ids(text.shape[1], grid), config.axes_dims, config.theta)
        image_stream = Linear(config.width, name="image_in", **common)(latents)
        text_stream = Linear(config.width, name="text_in", **common)(text)

        blocks = {"attention": self.attention, **common}
        double_blocks = scan_blocks(DoubleBlock, config.num_double_blocks, self.remat, self.unroll)
        streams, _ = double_blocks(config, name="double_blocks", **blocks)((image_stream, text_stream), vector, rope)
        joint = jnp.concatenate(streams[::-1], axis=1)  # text first
        single_blocks = scan_blocks(SingleBlock, config.num_single_blocks, self.remat, self.unroll)
        joint, _ = single_blocks(config, name="single_blocks", **blocks)(joint, vector, rope)

        shift, scale = Modulation(2, config.width, name="final_modulation", **common)(vector)
        final = modulate(joint[:, text.shape[1] :], shift, scale)
        velocity = Linear(config.in_channels, kernel_init=nn.initializers.zeros, name="final", **common)(final)
        return velocity.astype(jnp.float32)

    def _conditioning_vector(self, time: chex.Array, pooled: chex.Array, guidance: chex.Array | None) -> chex.Array:
        """The vector `[B, D]` that modulates every block."""
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        vector = Embedder(self.config.width, name="time_in", **common)(sinusoid(time))
        vector += Embedder(self.config.width, name="pooled_in", **common)(pooled)
        if guidance is not None:
            vector += Embedder(self.config.width, name="guidance_in", **common)(sinusoid(guidance))
        return vector
