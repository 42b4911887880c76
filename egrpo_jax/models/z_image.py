"""The Z-Image flow transformer (Tongyi Lab) as a pure Flax Linen module.

Image tokens pass through the blocks of `noise_refiner`, text tokens through those of `context_refiner`, then both,
concatenated as [image, text], through `layers`. Both streams are padded to multiples of 32 tokens with learned ones,
which are attended to. A prompt's length decides how many of them it gets, and where the image lies on the first axis of
positions: a batch has one shape, and what is beyond the padded length of a prompt is not attended to.
The blocks of each kind are scanned: compile time does not grow with depth, and parameters carry a leading layer axis.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import chex
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from egrpo_jax.models.attention import Backend, apply_rope, attention, rope_table
from egrpo_jax.models.layers import (
    QKV,
    TIME_FEATURES,
    Dtype,
    Embedder,
    Linear,
    Modulation,
    Remat,
    in_float32,
    layer_norm,
    scan_blocks,
    sinusoid,
    swiglu,
)

MULTIPLE = 32
"""Image tokens and text tokens are padded to a multiple of it."""

_TIME_INNER = 1024
_HEAD_EPSILON = 1e-5  # of queries and keys, whatever the other norms have
Rope: TypeAlias = tuple[chex.Array, chex.Array]


@dataclasses.dataclass(frozen=True)
class ZImageConfig:
    """Sizes of a Z-Image transformer; the defaults are the published model's (6,154,908,736 parameters)."""

    in_channels: int = 64
    num_layers: int = 30
    num_refiner_layers: int = 2
    num_heads: int = 30
    head_dim: int = 128
    text_dim: int = 2560
    axes_dims: tuple[int, int, int] = (32, 48, 48)
    axes_lens: tuple[int, int, int] = (1536, 512, 512)
    theta: float = 256.0
    epsilon: float = 1e-5

    def __post_init__(self) -> None:
        if sum(self.axes_dims) != self.head_dim:
            raise ValueError(f"axes_dims {self.axes_dims} must add up to head_dim {self.head_dim}")
        if self.in_channels % 4:
            raise ValueError(f"in_channels {self.in_channels} must be those of 2x2 patches, a multiple of 4")

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.num_heads * self.head_dim

    @property
    def mlp_dim(self) -> int:
        """Hidden units of a feed-forward part, 8/3 of the width, rounded as the published code does."""
        return int(self.width / 3 * 8)

    @property
    def time_dim(self) -> int:
        """Channels of the vector that modulates every block."""
        return min(self.width, 256)


def padded(tokens: int) -> int:
    """`tokens` rounded up to a multiple of 32; works for arrays too."""
    return tokens + -tokens % MULTIPLE


def forward_flops(config: ZImageConfig, image_tokens: int, text_tokens: int) -> int:
    """Floating-point operations of one sample's velocity: its matrix products, a multiply-add being two.

    `text_tokens` are those of the array, not of the prompt. With 128 of them: 13.7 and 56.6 TFLOP at 512 and 1024
    pixels square. The published code counts more, by what it embeds and projects of padding and of text.
    """
    width, image, text = config.width, padded(image_tokens), padded(text_tokens)

    def block(tokens: int) -> int:
        return tokens * (4 * width**2 + 3 * width * config.mlp_dim) + 2 * width * tokens**2

    blocks = config.num_refiner_layers * (block(image) + block(text)) + config.num_layers * block(image + text)
    modulations = (4 * (config.num_refiner_layers + config.num_layers) + 1) * width * config.time_dim
    time = (TIME_FEATURES + config.time_dim) * _TIME_INNER
    ends = (2 * image_tokens * config.in_channels + text_tokens * config.text_dim) * width
    return 2 * (blocks + modulations + time + ends)


def rope_tables(config: ZImageConfig, grid: tuple[int, int], ends: chex.Array, text_tokens: int) -> tuple[Rope, Rope]:
    """Cosines and sines for the image `[B, padded(N), head_dim / 2]` and the text `[text_tokens, head_dim / 2]`.

    Text token n is at (n + 1, 0, 0), its padding too; image tokens are at (end + 1, row, column), their padding at 0.

    Args:
      config: of the model.
      grid: rows and columns of image tokens, N together.
      ends: padded lengths of the prompts, integers `[B]`, up to `text_tokens`.
      text_tokens: padded tokens of the text's array.

    Raises:
      ValueError: there are more positions than the model has.
    """
    needed = (text_tokens + 2, *grid)
    if any(np.greater(needed, config.axes_lens)):
        raise ValueError(f"axes_lens {config.axes_lens} must be at least {needed}: text + 2, rows, columns")
    count = grid[0] * grid[1]
    places = np.zeros((padded(count), 3), int)
    places[:count, 1:] = np.indices(grid).reshape(2, -1).T
    starts = np.arange(1, text_tokens + 1)[:, None] * [1, 0, 0]

    first = rope_table(np.arange(text_tokens + 2)[:, None], config.axes_dims[:1], config.theta)
    still = rope_table(places, config.axes_dims, config.theta)
    cos, sin = (_at(ends + 1, count, *tables) for tables in zip(first, still, strict=True))
    return (cos, sin), rope_table(starts, config.axes_dims, config.theta)


def _at(positions: chex.Array, count: int, first: np.ndarray, table: np.ndarray) -> chex.Array:
    """`table [N, D]` for every sample: its first `count` rows at one of `positions [B]` of `first [positions, d]`."""
    gathered = jnp.asarray(first)[positions][:, None]
    size = first.shape[1]
    moved = jnp.where((np.arange(len(table)) < count)[:, None], gathered, table[:, :size])
    rest = jnp.broadcast_to(table[:, size:], (*moved.shape[:2], table.shape[1] - size))
    return jnp.concatenate([moved, rest], axis=-1)


class SwiGLU(nn.Module):
    """Two linear layers to `inner` channels, silu(first) * third, linear back; no biases: `[..., D]` to `[..., D]`."""

    inner: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        def linear(width: int, name: str) -> Linear:
            return Linear(width, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        first, third = linear(self.inner, "linear_1")(x), linear(self.inner, "linear_3")(x)
        return linear(x.shape[-1], "linear_2")(swiglu(first, third))


class Block(nn.Module):
    """A block of attention and feed-forward part, each between two norms; scaled and gated if there is a `vector`.

    Its call takes `x [B, N, D]`, `vector [B, time_dim]`, the cosines and sines of positions, and `lengths [B]` of what
    is attended to, or None for all.
    """

    config: ZImageConfig
    dtype: Dtype
    param_dtype: Dtype
    attention: Backend = "auto"

    @nn.compact
    def __call__(
        self, x: chex.Array, vector: chex.Array | None, rope: Rope, lengths: chex.Array | None
    ) -> tuple[chex.Array, None]:
        config, common = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        scale, gate, ff_scale, ff_gate = self._factors(vector)

        def norm(name: str, x: chex.Array) -> chex.Array:
            return nn.RMSNorm(epsilon=config.epsilon, name=name, **common)(x)

        hidden = in_float32(jnp.multiply, norm("attention_norm_1", x), scale)
        heads = QKV(config.num_heads, config.head_dim, use_bias=False, epsilon=_HEAD_EPSILON, name="qkv", **common)
        query, key, value = heads(hidden)
        query, key = apply_rope(query, *rope), apply_rope(key, *rope)
        mixed = attention(query, key, value, backend=self.attention, lengths=lengths).reshape(x.shape)
        out = Linear(config.width, use_bias=False, name="out", **common)(mixed)
        x = in_float32(_add_gated, x, gate, norm("attention_norm_2", out))

        hidden = in_float32(jnp.multiply, norm("ff_norm_1", x), ff_scale)
        hidden = SwiGLU(config.mlp_dim, name="ff", **common)(hidden)
        return in_float32(_add_gated, x, ff_gate, norm("ff_norm_2", hidden)), None

    def _factors(self, vector: chex.Array | None) -> tuple[chex.Array, ...]:
        """Scale and gate of either part, `[B, 1, D]`; ones without a vector. No SiLU comes before."""
        if vector is None:
            return (jnp.ones(()),) * 4
        linear = Linear(
            4 * self.config.width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.zeros,
            name="modulation",
        )
        scale, gate, ff_scale, ff_gate = jnp.split(linear(vector).astype(jnp.float32)[:, None], 4, axis=-1)
        return 1 + scale, jnp.tanh(gate), 1 + ff_scale, jnp.tanh(ff_gate)


def _add_gated(x: chex.Array, gate: chex.Array, part: chex.Array) -> chex.Array:
    return x + gate * part


class ZImage(nn.Module):
    """Velocity of a Z-Image flow model.

    Attributes:
      config: the sizes.
      dtype: what it computes in; the velocity is returned in float32.
      param_dtype: what the parameters are stored in.
      remat: what the backward pass computes again: `none` keeps every intermediate array; `projections` keeps the
        outputs of linear layers and of attention; `blocks` keeps the inputs of blocks alone.
      attention: what computes attention.
    """

    config: ZImageConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    remat: Remat = "none"
    attention: Backend = "auto"

    @nn.compact
    def __call__(
        self, latents: chex.Array, time: chex.Array, text: chex.Array, lengths: chex.Array, *, grid: tuple[int, int]
    ) -> chex.Array:
        """Predicts `noise - data`; the published model predicts `data - noise` from 1 - time.

        Args:
          latents: packed image tokens `[B, N, in_channels]`, row-major over `grid`.
          time: `[B]` in [0, 1], 1 is pure noise.
          text: text tokens `[B, L, text_dim]`, padded to any L with anything finite, which changes nothing.
          lengths: int32 `[B]`, from 1 to L: the tokens of `text` that are a prompt's.
          grid: rows and columns of image tokens; their product is N.

        Returns:
          The velocity `[B, N, in_channels]`, float32.

        Raises:
          ValueError: the text is longer, or the grid larger, than `config.axes_lens` allows.
        """
        config = self.config
        chex.assert_shape(latents, (None, grid[0] * grid[1], config.in_channels))
        chex.assert_shape(text, (latents.shape[0], None, config.text_dim))
        chex.assert_shape(lengths, (latents.shape[0],))
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        ends = padded(lengths)
        image_rope, text_rope = rope_tables(config, grid, ends, padded(text.shape[1]))
        time_in = Embedder(config.time_dim, inner=_TIME_INNER, name="time_in", **common)
        vector = time_in(sinusoid(1 - time.astype(jnp.float32)))

        image = self._stack("noise_refiner", self._image(latents), vector, image_rope, None)
        text = self._stack("context_refiner", self._text(text, lengths), None, text_rope, ends)
        joint = jnp.concatenate([image, text], axis=1)
        rope = tuple(_after(*tables) for tables in zip(image_rope, text_rope, strict=True))
        joint = self._stack("layers", joint, vector, rope, image.shape[1] + ends)

        scale = Modulation(1, config.width, name="final_modulation", **common)(vector)[0]
        final = in_float32(lambda x, scale: layer_norm(x) * (1 + scale), joint[:, : latents.shape[1]], scale)
        velocity = Linear(config.in_channels, kernel_init=nn.initializers.zeros, name="final", **common)(final)
        return -velocity.astype(jnp.float32)

    def _stack(self, name: str, x: chex.Array, *arguments: Any) -> chex.Array:
        """`x` after the blocks of this name."""
        config = self.config
        length = config.num_layers if name == "layers" else config.num_refiner_layers
        blocks = scan_blocks(Block, length, self.remat)
        return blocks(config, self.dtype, self.param_dtype, self.attention, name=name)(x, *arguments)[0]

    def _image(self, latents: chex.Array) -> chex.Array:
        """Image tokens in the width of the model, and their padding `[B, padded(N), D]`."""
        image = Linear(self.config.width, dtype=self.dtype, param_dtype=self.param_dtype, name="image_in")(latents)
        batch, tokens, width = image.shape
        pads = jnp.broadcast_to(self._pad_token("image_pad"), (batch, padded(tokens) - tokens, width))
        return jnp.concatenate([image, pads], axis=1)

    def _text(self, text: chex.Array, lengths: chex.Array) -> chex.Array:
        """Text tokens in the width of the model, everything beyond `lengths` being padding: `[B, padded(L), D]`."""
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        text = nn.RMSNorm(epsilon=self.config.epsilon, name="text_norm", **common)(text)
        text = Linear(self.config.width, name="text_in", **common)(text)
        text = jnp.pad(text, ((0, 0), (0, -text.shape[1] % MULTIPLE), (0, 0)))
        real = jnp.arange(text.shape[1]) < lengths[:, None]
        return jnp.where(real[..., None], text, self._pad_token("text_pad"))

    def _pad_token(self, name: str) -> chex.Array:
        shape = (1, self.config.width)
        return self.param(name, nn.initializers.zeros, shape, self.param_dtype).astype(self.dtype)


def _after(image: chex.Array, text: chex.Array) -> chex.Array:
    """Tables of the joint sequence `[B, N + L, D]`, of the image's `[B, N, D]` and the text's `[L, D]`."""
    return jnp.concatenate([image, jnp.broadcast_to(text, (image.shape[0], *text.shape))], axis=1)
