"""The FLUX.1 flow transformer (Black Forest Labs) as a pure Flax Linen module.

Image tokens and text tokens pass through `num_double_blocks` blocks with separate weights and joint attention, then,
concatenated as [text, image], through `num_single_blocks` blocks with shared weights. Every block is modulated by
one vector made of the time, the pooled text and, for guidance-distilled models, the guidance scale.
The blocks of each kind are scanned: compile time does not grow with depth, and parameters carry a leading layer axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from egrpo_jax.models.attention import Implementation, apply_rope, attention, rope_table

Dtype = Any
Remat = Literal["none", "projections", "blocks"]
TIME_FEATURES = 256


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


def sinusoid(value: chex.Array, dim: int = TIME_FEATURES) -> chex.Array:
    """Cosines, then sines, of `1000 * value [B]` at `dim / 2` frequencies 10000^(-2i/dim): `[B, dim]`, float32."""
    # The published code rounds the exponents to float32; at angles up to 5000 that shows in the velocity.
    exponents = np.float32(-np.log(10_000.0)) * np.arange(dim // 2, dtype=np.float32) / np.float32(dim // 2)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = 1000.0 * value.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Linear(nn.Dense):
    """A dense layer that sees its input as one matrix: flat matmuls are the fastest form on every backend."""

    @nn.compact
    def __call__(self, inputs: chex.Array) -> chex.Array:
        outputs = super().__call__(inputs.reshape(-1, inputs.shape[-1])).reshape(*inputs.shape[:-1], self.features)
        return checkpoint_name(outputs, "projection")


def layer_norm(x: chex.Array) -> chex.Array:
    """Layer normalisation of the last axis without parameters, statistics in float32, epsilon 1e-6."""
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
    return ((x32 - mean) * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def in_float32(function: Callable[..., chex.Array], *arrays: chex.Array) -> chex.Array:
    """`function` of `arrays` in float32, rounded once to the dtype of the first; XLA would round after every step."""
    return function(*(array.astype(jnp.float32) for array in arrays)).astype(arrays[0].dtype)


def modulate(x: chex.Array, shift: chex.Array, scale: chex.Array) -> chex.Array:
    """Adaptive layer norm: `LN(x) * (1 + scale) + shift`."""
    return in_float32(lambda x, shift, scale: layer_norm(x) * (1 + scale) + shift, x, shift, scale)


def gelu(x: chex.Array) -> chex.Array:
    """GELU by its approximation with tanh."""
    return in_float32(nn.gelu, x)


def silu(x: chex.Array) -> chex.Array:
    """x * sigmoid(x)."""
    return in_float32(nn.silu, x)


class Embedder(nn.Module):
    """Linear, SiLU, linear."""

    width: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        kwargs = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return Linear(self.width, name="linear_2", **kwargs)(silu(Linear(self.width, name="linear_1", **kwargs)(x)))


class Modulation(nn.Module):
    """`chunks` vectors `[B, 1, width]` from the conditioning vector; zero at initialisation (adaLN-zero)."""

    chunks: int
    width: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, vector: chex.Array) -> list[chex.Array]:
        linear = Linear(
            self.chunks * self.width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.zeros,
            name="linear",
        )
        return jnp.split(linear(silu(vector))[:, None], self.chunks, axis=-1)


class QKV(nn.Module):
    """Query, key and value heads `[B, N, H, D]`; RMS norm over the head for query and key."""

    config: FluxConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: chex.Array) -> tuple[chex.Array, chex.Array, chex.Array]:
        config = self.config

        def heads(name: str) -> chex.Array:
            projected = Linear(config.width, dtype=self.dtype, param_dtype=self.param_dtype, name=name)(x)
            return projected.reshape(*x.shape[:-1], config.num_heads, config.head_dim)

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

        return norm("norm_q")(heads("to_q")), norm("norm_k")(heads("to_k")), heads("to_v")


class FeedForward(nn.Module):
    """Linear, GELU (tanh), linear."""

    config: FluxConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        kwargs = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        hidden = Linear(self.config.mlp_ratio * self.config.width, name="linear_1", **kwargs)(x)
        return Linear(self.config.width, name="linear_2", **kwargs)(gelu(hidden))


def _rotate_and_attend(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    rope: tuple[chex.Array, chex.Array],
    implementation: Implementation | None,
) -> chex.Array:
    """Attention of heads `[B, N, H, D]` at their positions, heads joined: `[B, N, H * D]`."""
    mixed = attention(apply_rope(query, *rope), apply_rope(key, *rope), value, implementation=implementation)
    return checkpoint_name(mixed.reshape(*mixed.shape[:2], -1), "attention")


class DoubleBlock(nn.Module):
    """A block with separate weights for image and text, attending jointly."""

    config: FluxConfig
    dtype: Dtype
    param_dtype: Dtype
    attention: Implementation | None

    @nn.compact
    def __call__(
        self,
        streams: tuple[chex.Array, chex.Array],
        vector: chex.Array,
        rope: tuple[chex.Array, chex.Array],
    ) -> tuple[tuple[chex.Array, chex.Array], None]:
        image, text = streams
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = self.config.width
        image_mod = Modulation(6, width, name="image_modulation", **common)(vector)
        text_mod = Modulation(6, width, name="text_modulation", **common)(vector)

        image_qkv = QKV(self.config, name="image_qkv", **common)(modulate(image, image_mod[0], image_mod[1]))
        text_qkv = QKV(self.config, name="text_qkv", **common)(modulate(text, text_mod[0], text_mod[1]))
        query, key, value = (jnp.concatenate(pair, axis=1) for pair in zip(text_qkv, image_qkv, strict=True))
        mixed = _rotate_and_attend(query, key, value, rope, self.attention)
        text_mixed, image_mixed = jnp.split(mixed, [text.shape[1]], axis=1)

        image = image + image_mod[2] * Linear(width, name="image_out", **common)(image_mixed)
        text = text + text_mod[2] * Linear(width, name="text_out", **common)(text_mixed)
        image_ff = FeedForward(self.config, name="image_ff", **common)
        text_ff = FeedForward(self.config, name="text_ff", **common)
        image = image + image_mod[5] * image_ff(modulate(image, image_mod[3], image_mod[4]))
        text = text + text_mod[5] * text_ff(modulate(text, text_mod[3], text_mod[4]))
        return (image, text), None


class SingleBlock(nn.Module):
    """A block over the joint sequence, attention and feed-forward in parallel."""

    config: FluxConfig
    dtype: Dtype
    param_dtype: Dtype
    attention: Implementation | None

    @nn.compact
    def __call__(
        self, x: chex.Array, vector: chex.Array, rope: tuple[chex.Array, chex.Array]
    ) -> tuple[chex.Array, None]:
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width = self.config.width
        shift, scale, gate = Modulation(3, width, name="modulation", **common)(vector)
        hidden = modulate(x, shift, scale)
        query, key, value = QKV(self.config, name="qkv", **common)(hidden)
        mixed = _rotate_and_attend(query, key, value, rope, self.attention)
        mlp = gelu(Linear(self.config.mlp_ratio * width, name="mlp", **common)(hidden))
        joined = jnp.concatenate([mixed, mlp], axis=-1)
        return x + gate * Linear(width, name="out", **common)(joined), None


def _scan(block: type[nn.Module], length: int, remat: Remat, unroll: int) -> type[nn.Module]:
    if remat != "none":
        kept = ("projection", "attention") if remat == "projections" else ()
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        # A loop keeps XLA from merging the two computations of a block; what is unrolled needs a barrier.
        block = nn.remat(block, policy=policy, prevent_cse=unroll > 1)
    return nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, nn.broadcast),
        length=length,
        unroll=unroll,
    )


class Flux(nn.Module):
    """Velocity of a FLUX.1 flow model.

    Attributes:
      config: the sizes.
      dtype: what it computes in; the velocity is returned in float32.
      param_dtype: what the parameters are stored in.
      unroll: blocks in one trip of the scan; more compile longer, and run faster where a model is small.
      remat: what the backward pass computes again. `none` keeps every intermediate array; `projections` keeps the
        outputs of linear layers and of attention; `blocks` keeps the inputs of blocks alone.
      attention: the implementation of attention; by default the best that the default device has.
    """

    config: FluxConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    unroll: int = 1
    remat: Remat = "none"
    attention: Implementation | None = None

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
        """
        config = self.config
        chex.assert_shape(latents, (None, grid[0] * grid[1], config.in_channels))
        chex.assert_shape(text, (latents.shape[0], None, config.text_dim))
        if (guidance is not None) != config.guidance_embed:
            raise ValueError(f"guidance_embed is {config.guidance_embed}, but guidance is {guidance}")
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        vector = Embedder(config.width, name="time_in", **common)(sinusoid(time))
        vector += Embedder(config.width, name="pooled_in", **common)(pooled)
        if guidance is not None:
            vector += Embedder(config.width, name="guidance_in", **common)(sinusoid(guidance))
        rope = rope_table(position_ids(text.shape[1], grid), config.axes_dims, config.theta)

        image_stream = Linear(config.width, name="image_in", **common)(latents)
        text_stream = Linear(config.width, name="text_in", **common)(text)
        blocks = {"config": config, "attention": self.attention, **common}
        double_blocks = _scan(DoubleBlock, config.num_double_blocks, self.remat, self.unroll)(
            name="double_blocks", **blocks
        )
        (image_stream, text_stream), _ = double_blocks((image_stream, text_stream), vector, rope)
        joint = jnp.concatenate([text_stream, image_stream], axis=1)
        single_blocks = _scan(SingleBlock, config.num_single_blocks, self.remat, self.unroll)(
            name="single_blocks", **blocks
        )
        joint, _ = single_blocks(joint, vector, rope)
        shift, scale = Modulation(2, config.width, name="final_modulation", **common)(vector)
        final = modulate(joint[:, text.shape[1] :], shift, scale)
        velocity = Linear(config.in_channels, kernel_init=nn.initializers.zeros, name="final", **common)(final)
        return velocity.astype(jnp.float32)
