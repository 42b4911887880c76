"""Layers that several models here are made of.

Matrix products take and give the dtype of the computation; norms and activations between them are computed in float32
and rounded once.
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

from egrpo_jax.models.attention import Backend, apply_rope, attention
from egrpo_jax.models.lora import COLLECTION

Dtype = Any
Remat = Literal["none", "projections", "blocks"]
"""Arrays that a backward pass makes again: `none`; `projections`, all but the outputs of `Linear` and of attention;
`blocks`, all but the inputs of blocks."""

TIME_FEATURES = 256
"""Channels of `sinusoid`."""


class Linear(nn.Dense):
    """A dense layer whose output `remat` may keep."""

    @nn.compact
    def __call__(self, inputs: chex.Array) -> chex.Array:
        return checkpoint_name(super().__call__(inputs), "projection")


class LayerNorm(nn.LayerNorm):
    """Layer normalisation with scale and bias; its variance is not E[x^2] - E[x]^2, which cancels."""

    epsilon: float = 1e-5
    use_fast_variance: bool = False


def layer_norm(x: chex.Array) -> chex.Array:
    """Layer normalisation of the last axis without parameters, statistics in float32, epsilon 1e-6."""
    x32 = x.astype(jnp.float32)
    mean = x32.mean(-1, keepdims=True)
    variance = jnp.square(x32 - mean).mean(-1, keepdims=True)
    return ((x32 - mean) * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def normalise(x: chex.Array) -> chex.Array:
    """`x [..., D]` scaled to unit length; a zero vector stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)


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


def swiglu(gate: chex.Array, up: chex.Array) -> chex.Array:
    """silu(gate) * up (Shazeer, 2020, arXiv:2002.05202)."""
    return in_float32(lambda gate, up: nn.silu(gate) * up, gate, up)


def sinusoid(value: chex.Array) -> chex.Array:
    """Cosines, then sines, of `1000 * value [B]` at 128 frequencies 10000^(-i/128): `[B, TIME_FEATURES]`, float32."""
    # The published code rounds the exponents to float32; at angles up to 5000 that shows in the velocity.
    half = TIME_FEATURES // 2
    exponents = np.float32(-np.log(10_000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = 1000.0 * value.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Embedder(nn.Module):
    """Linear to `inner` channels, `width` if there is none, SiLU, linear: `[..., C]` to `[..., width]`."""

    width: int
    dtype: Dtype
    param_dtype: Dtype
    inner: int | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        common = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        hidden = Linear(self.inner or self.width, name="linear_1", **common)(x)
        return Linear(self.width, name="linear_2", **common)(silu(hidden))


class FeedForward(nn.Module):
    """Linear to `inner` channels, GELU (tanh), linear back: `[..., D]` to `[..., D]`."""

    inner: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        hidden = Linear(self.inner, name="linear_1", **common)(x)
        return Linear(x.shape[-1], name="linear_2", **common)(gelu(hidden))


class Modulation(nn.Module):
    """`chunks` vectors `[B, 1, width]` from the conditioning vector; zero at initialisation (adaLN-zero)."""

    chunks: int
    width: int
    dtype: Dtype
    param_dtype: Dtype
    use_bias: bool = True

    @nn.compact
    def __call__(self, vector: chex.Array) -> list[chex.Array]:
        linear = Linear(
            self.chunks * self.width,
            self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.zeros,
            name="linear",
        )
        return jnp.split(linear(silu(vector))[:, None], self.chunks, axis=-1)


class QKV(nn.Module):
    """Query, key and value heads `[B, N, H, head_dim]` of `[B, N, D]`; RMS norm over each head of query and key."""

    num_heads: int
    head_dim: int
    dtype: Dtype
    param_dtype: Dtype
    use_bias: bool = True
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: chex.Array) -> tuple[chex.Array, chex.Array, chex.Array]:
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def heads(name: str) -> chex.Array:
            projected = Linear(self.num_heads * self.head_dim, self.use_bias, name=name, **common)(x)
            return projected.reshape(*x.shape[:-1], self.num_heads, self.head_dim)

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(epsilon=self.epsilon, name=name, **common)

        return norm("norm_q")(heads("to_q")), norm("norm_k")(heads("to_k")), heads("to_v")


def rotate_and_attend(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    rope: tuple[chex.Array, chex.Array],
    backend: Backend,
) -> chex.Array:
    """Attention of heads `[B, N, H, head_dim]` at their positions, heads joined: `[B, N, D]`."""
    mixed = attention(apply_rope(query, *rope), apply_rope(key, *rope), value, backend=backend)
    return mixed.reshape(*mixed.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class StackConfig:
    """Sizes of a stack of blocks of self-attention and feed-forward part."""

    width: int
    num_layers: int
    num_heads: int
    mlp_dim: int

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} must divide width {self.width}")


def stack_flops(config: StackConfig, tokens: int) -> int:
    """Floating-point operations of a stack over one sequence; a causal mask saves none, norms cost none."""
    linear = 2 * tokens * (4 * config.width**2 + 2 * config.width * config.mlp_dim)
    return config.num_layers * (linear + 4 * tokens**2 * config.width)


def scan_blocks(block: type[nn.Module], length: int, remat: Remat = "none", unroll: int = 1) -> Any:
    """Makes a stack of blocks a loop over one: compile time does not grow with depth.

    Args:
      block: its call takes what passes from block to block, of any structure, and any number of arguments that are the
        same for all blocks; it returns what it passes on, and None.
      length: how many blocks.
      remat: the arrays that the backward pass computes again.
      unroll: blocks in one trip of the loop.

    Returns:
      A module class, of the block's attributes, arguments and results. Parameters, and LoRA's adapters if there are
      some, carry a leading layer axis.
    """
    if remat != "none":
        kept = ("projection", "attention") if remat == "projections" else ()
        policy = jax.checkpoint_policies.save_only_these_names(*kept)
        # A loop keeps XLA from merging the two computations of a block; what is unrolled needs a barrier.
        block = nn.remat(block, policy=policy, prevent_cse=unroll > 1)
    return nn.scan(
        block,
        variable_axes={"params": 0, COLLECTION: 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=length,
        unroll=unroll,
    )
