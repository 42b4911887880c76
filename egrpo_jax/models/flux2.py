"""The FLUX.2 flow transformer (Black Forest Labs) as a pure Flax Linen module.

Two streams and then one, as in FLUX.1, but: no layer has a bias, all blocks of a kind share one modulation, made of the
time (and of the guidance scale where the model embeds it), feed-forward parts are gated, and text tokens have positions
on an axis of their own. The first and the last layer of a single block each are one matrix for attention and
feed-forward, as published, so that one pair of LoRA matrices adapts both.
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
    Linear,
    Modulation,
    Remat,
    modulate,
    rotate_and_attend,
    scan_blocks,
    sinusoid,
    swiglu,
)


@dataclasses.dataclass(frozen=True)
class Flux2Config:
    """Sizes of a FLUX.2 transformer; the defaults are FLUX.2-klein-4B (3,875,544,576 parameters)."""

    in_channels: int = 128
    num_double_blocks: int = 5
    num_single_blocks: int = 20
    num_heads: int = 24
    head_dim: int = 128
    text_dim: int = 7680
    guidance_embed: bool = False
    axes_dims: tuple[int, int, int, int] = (32, 32, 32, 32)
    theta: float = 2_000.0
    mlp_ratio: int = 3

    def __post_init__(self) -> None:
        if sum(self.axes_dims) != self.head_dim:
            raise ValueError(f"axes_dims {self.axes_dims} must add up to head_dim {self.head_dim}")

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.num_heads * self.head_dim

    @property
    def mlp_width(self) -> int:
        """Hidden units of a feed-forward part, each of which has a gate."""
        return self.mlp_ratio * self.width


def forward_flops(config: Flux2Config, image_tokens: int, text_tokens: int) -> int:
    """Floating-point operations of one sample's velocity: its matrix products, a multiply-add being two.

    FLUX.2-klein-4B with 512 text tokens: 10.2 and 34.8 TFLOP at 512 and 1024 pixels square.
    """
    width, tokens = config.width, image_tokens + text_tokens
    blocks = config.num_double_blocks + config.num_single_blocks
    per_token = (4 + 3 * config.mlp_ratio) * width**2  # qkv, out and the feed-forward, alike in both kinds of blocks
    modulations = (6 + 6 + 3 + 2) * width**2
    embedders = (1 + config.guidance_embed) * (TIME_FEATURES + width)
    ends = 2 * image_tokens * config.in_channels + text_tokens * config.text_dim
    attention_products = 2 * width * tokens**2
    return 2 * (blocks * (per_token * tokens + attention_products) + modulations + (embedders + ends) * width)


def position_ids(text_tokens: int, grid: tuple[int, int]) -> np.ndarray:
    """Positions `[text_tokens + rows * columns, 4]`: (0, 0, 0, n) for text, then (0, row, column, 0), row-major."""
    text = np.zeros((text_tokens, 4), int)
    text[:, 3] = np.arange(text_tokens)
    image = np.zeros((grid[0] * grid[1], 4), int)
    image[:, 1:3] = np.indices(grid).reshape(2, -1).T
    return np.concatenate([text, image])


class GatedFeedForward(nn.Module):
    """Linear to `inner` gates and `inner` hidden units, SwiGLU, linear back: `[..., D]` to `[..., D]`."""

    inner: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        common = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        hidden = Linear(2 * self.inner, name="linear_1", **common)(x)
        return Linear(x.shape[-1], name="linear_2", **common)(swiglu(*jnp.split(hidden, 2, axis=-1)))


class DoubleBlock(nn.Module):
    """A block with separate weights for image and text, attending jointly."""

    config: Flux2Config
    dtype: Dtype
    param_dtype: Dtype
    attention: Backend = "auto"

    @nn.compact
    def __call__(
        self,
        streams: tuple[chex.Array, chex.Array],
        image_mod: list[chex.Array],
        text_mod: list[chex.Array],
        rope: tuple[chex.Array, chex.Array],
    ) -> tuple[tuple[chex.Array, chex.Array], None]:
        image, text = streams
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        plain = {"use_bias": False, **common}
        width, heads = self.config.width, (self.config.num_heads, self.config.head_dim)

        image_qkv = QKV(*heads, name="image_qkv", **plain)(modulate(image, image_mod[0], image_mod[1]))
        text_qkv = QKV(*heads, name="text_qkv", **plain)(modulate(text, text_mod[0], text_mod[1]))
        query, key, value = (jnp.concatenate(pair, axis=1) for pair in zip(text_qkv, image_qkv, strict=True))
        mixed = rotate_and_attend(query, key, value, rope, self.attention)
        text_mixed, image_mixed = jnp.split(mixed, [text.shape[1]], axis=1)

        image = image + image_mod[2] * Linear(width, name="image_out", **plain)(image_mixed)
        text = text + text_mod[2] * Linear(width, name="text_out", **plain)(text_mixed)
        image_ff = GatedFeedForward(self.config.mlp_width, name="image_ff", **common)
        text_ff = GatedFeedForward(self.config.mlp_width, name="text_ff", **common)
        image = image + image_mod[5] * image_ff(modulate(image, image_mod[3], image_mod[4]))
        text = text + text_mod[5] * text_ff(modulate(text, text_mod[3], text_mod[4]))
        return (image, text), None


class SingleBlock(nn.Module):
    """A block over the joint sequence, attention and feed-forward in parallel."""

    config: Flux2Config
    dtype: Dtype
    param_dtype: Dtype
    attention: Backend = "auto"

    @nn.compact
    def __call__(
        self, x: chex.Array, modulation: list[chex.Array], rope: tuple[chex.Array, chex.Array]
    ) -> tuple[chex.Array, None]:
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        config, width = self.config, self.config.width
        shift, scale, gate = modulation
        joined = Linear(3 * width + 2 * config.mlp_width, False, name="qkv_mlp", **common)(modulate(x, shift, scale))
        *qkv, hidden = jnp.split(joined, [width, 2 * width, 3 * width], axis=-1)
        query, key, value = (part.reshape(*x.shape[:-1], config.num_heads, config.head_dim) for part in qkv)
        query = nn.RMSNorm(name="norm_q", **common)(query)
        key = nn.RMSNorm(name="norm_k", **common)(key)
        mixed = rotate_and_attend(query, key, value, rope, self.attention)
        joined = jnp.concatenate([mixed, swiglu(*jnp.split(hidden, 2, axis=-1))], axis=-1)
        return x + gate * Linear(width, False, name="out", **common)(joined), None


class Flux2(nn.Module):
    """Velocity of a FLUX.2 flow model.

    Attributes:
      config: the sizes.
      dtype: what it computes in; the velocity is returned in float32.
      param_dtype: what the parameters are stored in.
      remat: what the backward pass computes again: `none` keeps every intermediate array; `projections` keeps the
        outputs of linear layers and of attention; `blocks` keeps the inputs of blocks alone.
      attention: what computes attention.
    """

    config: Flux2Config
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: Remat = "none"
    attention: Backend = "auto"

    @nn.compact
    def __call__(
        self,
        latents: chex.Array,
        time: chex.Array,
        text: chex.Array,
        guidance: chex.Array | None = None,
        *,
        grid: tuple[int, int],
    ) -> chex.Array:
        """Predicts `noise - data`.

        Args:
          latents: packed image tokens `[B, N, in_channels]`, row-major over `grid`.
          time: `[B]` in [0, 1], 1 is pure noise.
          text: text tokens `[B, L, text_dim]`; attended to without a mask, pads too.
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
        plain = {"use_bias": False, **common}
        vector = self._conditioning_vector(time, guidance)
        image_mod = Modulation(6, config.width, name="image_modulation", **plain)(vector)
        text_mod = Modulation(6, config.width, name="text_modulation", **plain)(vector)
        single_mod = Modulation(3, config.width, name="single_modulation", **plain)(vector)
        rope = rope_table(position_ids(text.shape[1], grid), config.axes_dims, config.theta)
        image_stream = Linear(config.width, name="image_in", **plain)(latents)
        text_stream = Linear(config.width, name="text_in", **plain)(text)

        blocks = {"attention": self.attention, **common}
        double_blocks = scan_blocks(DoubleBlock, config.num_double_blocks, self.remat)
        streams = (image_stream, text_stream)
        streams, _ = double_blocks(config, name="double_blocks", **blocks)(streams, image_mod, text_mod, rope)
        joint = jnp.concatenate(streams[::-1], axis=1)  # text first
        single_blocks = scan_blocks(SingleBlock, config.num_single_blocks, self.remat)
        joint, _ = single_blocks(config, name="single_blocks", **blocks)(joint, single_mod, rope)

        shift, scale = Modulation(2, config.width, name="final_modulation", **plain)(vector)
        final = modulate(joint[:, text.shape[1] :], shift, scale)
        velocity = Linear(config.in_channels, kernel_init=nn.initializers.zeros, name="final", **plain)(final)
        return velocity.astype(jnp.float32)

    def _conditioning_vector(self, time: chex.Array, guidance: chex.Array | None) -> chex.Array:
        """The vector `[B, D]` that all modulations are made of."""
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype, "use_bias": False}
        vector = Embedder(self.config.width, name="time_in", **common)(sinusoid(time))
        if guidance is not None:
            vector += Embedder(self.config.width, name="guidance_in", **common)(sinusoid(guidance))
        return vector
