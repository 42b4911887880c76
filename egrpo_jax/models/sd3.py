"""The Stable Diffusion 3.5 flow transformer (Stability AI, MMDiT-X; arXiv:2403.03206) as a pure Flax Linen module.

Image and text tokens pass through blocks with separate weights and joint attention, each modulated by one vector made
of the time and the pooled text. In the first `num_dual_blocks` of them image tokens also attend to themselves alone;
the last block reads the text and passes it on no more. Image tokens know their places by a stored table.
The blocks of each kind are scanned: compile time does not grow with depth, and parameters carry a leading layer axis.
"""

from __future__ import annotations

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from egrpo_jax.models.attention import Backend, attention
from egrpo_jax.models.layers import (
    QKV,
    TIME_FEATURES,
    Dtype,
    Embedder,
    FeedForward,
    Linear,
    Modulation,
    Remat,
    modulate,
    scan_blocks,
    sinusoid,
)

_MLP_RATIO = 4


@dataclasses.dataclass(frozen=True)
class Sd3Config:
    """Sizes of an SD3.5 transformer; the defaults are SD3.5 Medium (2,243,171,520 parameters and the positions).

    Attributes:
      in_channels: of a token, four for each latent channel.
      num_blocks: all blocks, the last included.
      num_dual_blocks: how many of them, from the first on, have a second attention.
      max_grid: rows, and columns, of the table of positions: a grid of tokens is cut out of its middle.
    """

    in_channels: int = 64
    num_blocks: int = 24
    num_dual_blocks: int = 13
    num_heads: int = 24
    head_dim: int = 64
    text_dim: int = 4096
    pooled_dim: int = 2048
    max_grid: int = 384

    def __post_init__(self) -> None:
        if self.in_channels % 4:
            raise ValueError(f"in_channels {self.in_channels} must be a multiple of 4: patches are 2x2")
        if not 0 <= self.num_dual_blocks < self.num_blocks:
            raise ValueError(f"num_dual_blocks {self.num_dual_blocks} must be below num_blocks {self.num_blocks}")

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.num_heads * self.head_dim

    @property
    def num_plain_blocks(self) -> int:
        """Blocks between those with a second attention and the last one."""
        return self.num_blocks - self.num_dual_blocks - 1


def forward_flops(config: Sd3Config, image_tokens: int, text_tokens: int) -> int:
    """Floating-point operations of one sample's velocity: its matrix products, a multiply-add being two.

    With 333 text tokens, at 512 and 1024 pixels square: SD3.5 Medium 2.44 and 11.2 TFLOP, Large 7.98 and 31.1.
    """
    width, tokens, dual = config.width, image_tokens + text_tokens, config.num_dual_blocks
    per_token = (4 + 2 * _MLP_RATIO) * width**2  # qkv, out and the feed-forward
    blocks = config.num_blocks * (per_token * tokens + 2 * width * tokens**2)
    second_attention = dual * (4 * width**2 * image_tokens + 2 * width * image_tokens**2)
    unused = (per_token - 3 * width**2) * text_tokens  # the last block makes keys, values and queries of text alone
    modulations = (12 * config.num_blocks + 3 * dual - 4 + 2) * width**2
    embedders = TIME_FEATURES + config.pooled_dim + 2 * width
    ends = 2 * image_tokens * config.in_channels + text_tokens * config.text_dim
    return 2 * (blocks + second_attention - unused + modulations + (embedders + ends) * width)


class Block(nn.Module):
    """A block with separate weights for image and text, attending jointly.

    Attributes:
      config: the sizes.
      dtype: what it computes in.
      param_dtype: what the parameters are stored in.
      attention: what computes attention.
      dual: the image attends to itself too, by weights of its own.
      last: the text leaves as it came.
    """

    config: Sd3Config
    dtype: Dtype
    param_dtype: Dtype
    attention: Backend = "auto"
    dual: bool = False
    last: bool = False

    @nn.compact
    def __call__(
        self, streams: tuple[chex.Array, chex.Array], vector: chex.Array
    ) -> tuple[tuple[chex.Array, chex.Array], None]:
        image, text = streams
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width, heads = self.config.width, (self.config.num_heads, self.config.head_dim)
        image_mod = Modulation(9 if self.dual else 6, width, name="image_modulation", **common)(vector)
        text_mod = Modulation(2 if self.last else 6, width, name="text_modulation", **common)(vector)

        image_qkv = QKV(*heads, name="image_qkv", **common)(modulate(image, image_mod[0], image_mod[1]))
        text_qkv = QKV(*heads, name="text_qkv", **common)(modulate(text, text_mod[0], text_mod[1]))
        joint = (jnp.concatenate(pair, axis=1) for pair in zip(text_qkv, image_qkv, strict=True))
        text_mixed, image_mixed = jnp.split(self._attend(*joint), [text.shape[1]], axis=1)
        mixed = image + image_mod[2] * Linear(width, name="image_out", **common)(image_mixed)
        if self.dual:  # of the stream as it came into the block
            self_qkv = QKV(*heads, name="self_qkv", **common)(modulate(image, image_mod[6], image_mod[7]))
            mixed += image_mod[8] * Linear(width, name="self_out", **common)(self._attend(*self_qkv))
        image_ff = FeedForward(_MLP_RATIO * width, name="image_ff", **common)
        image = mixed + image_mod[5] * image_ff(modulate(mixed, image_mod[3], image_mod[4]))
        if self.last:
            return (image, text), None

        text = text + text_mod[2] * Linear(width, name="text_out", **common)(text_mixed)
        text_ff = FeedForward(_MLP_RATIO * width, name="text_ff", **common)
        return (image, text + text_mod[5] * text_ff(modulate(text, text_mod[3], text_mod[4]))), None

    def _attend(self, query: chex.Array, key: chex.Array, value: chex.Array) -> chex.Array:
        """Attention of heads `[B, N, H, head_dim]`, heads joined: `[B, N, D]`."""
        mixed = attention(query, key, value, backend=self.attention)
        return mixed.reshape(*mixed.shape[:2], -1)


class Sd3(nn.Module):
    """Velocity of an SD3.5 flow model.

    Attributes:
      config: the sizes.
      dtype: what it computes in; the velocity is returned in float32.
      param_dtype: what the parameters are stored in.
      remat: what the backward pass computes again: `none` keeps every intermediate array; `projections` keeps the
        outputs of linear layers and of attention; `blocks` keeps the inputs of blocks alone.
      attention: what computes attention.
    """

    config: Sd3Config
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: Remat = "none"
    attention: Backend = "auto"

    @nn.compact
    def __call__(
        self, latents: chex.Array, time: chex.Array, text: chex.Array, pooled: chex.Array, *, grid: tuple[int, int]
    ) -> chex.Array:
        """Predicts `noise - data`.

        Args:
          latents: packed image tokens `[B, N, in_channels]`, row-major over `grid`.
          time: `[B]` in [0, 1], 1 is pure noise.
          text: text tokens `[B, L, text_dim]`; attended to without a mask.
          pooled: pooled text `[B, pooled_dim]`.
          grid: rows and columns of image tokens; their product is N.

        Returns:
          The velocity `[B, N, in_channels]`, float32.

        Raises:
          ValueError: the grid is larger than the table of positions.
        """
        config = self.config
        chex.assert_shape(latents, (None, grid[0] * grid[1], config.in_channels))
        chex.assert_shape(text, (latents.shape[0], None, config.text_dim))
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        vector = Embedder(config.width, name="time_in", **common)(sinusoid(time))
        vector += Embedder(config.width, name="pooled_in", **common)(pooled)
        image_stream = Linear(config.width, name="image_in", **common)(latents) + self._positions(grid)
        streams = image_stream, Linear(config.width, name="text_in", **common)(text)

        stacks = (
            ("dual_blocks", config.num_dual_blocks, True, False),
            ("plain_blocks", config.num_plain_blocks, False, False),
            ("last_blocks", 1, False, True),
        )
        for name, length, dual, last in stacks:
            if length:
                blocks = scan_blocks(Block, length, self.remat)(
                    config, attention=self.attention, dual=dual, last=last, name=name, **common
                )
                streams, _ = blocks(streams, vector)

        shift, scale = Modulation(2, config.width, name="final_modulation", **common)(vector)
        final = modulate(streams[0], shift, scale)
        velocity = Linear(config.in_channels, kernel_init=nn.initializers.zeros, name="final", **common)(final)
        return velocity.astype(jnp.float32)

    def _positions(self, grid: tuple[int, int]) -> chex.Array:
        """The middle of the stored table, `[rows * columns, D]`; published as a constant, it is not trained."""
        size, width = self.config.max_grid, self.config.width
        if max(grid) > size:
            raise ValueError(f"grid {grid[0]}x{grid[1]} is larger than the table of positions, {size}x{size}")
        table = self.param("positions", nn.initializers.normal(0.02), (size**2, width), self.param_dtype)
        top, left = ((size - side) // 2 for side in grid)
        cropped = table.reshape(size, size, width)[top : top + grid[0], left : left + grid[1]]
        return jax.lax.stop_gradient(cropped.reshape(-1, width)).astype(self.dtype)
