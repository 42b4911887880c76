"""Attention and rotary position embeddings, shared by every transformer here."""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np


def attention(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array | None = None) -> chex.Array:
    """Softmax attention, scaled by 1/sqrt(head dim), with float32 softmax.

    Args:
      query, key, value: `[B, N, H, D]`.
      mask: boolean, broadcastable to `[B, H, N, N]`; False positions are not attended to.

    Returns:
      `[B, N, H, D]`, in the dtype of `value`.
    """
    return jax.nn.dot_product_attention(query, key, value, mask=mask)


def rope_table(ids: np.ndarray, axes_dims: Sequence[int], theta: float = 10_000.0) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine tables of the rotary embedding of several position axes.

    Computed in float64 on the host, as the published model does: float32 angles lose digits at high positions.

    Args:
      ids: `[N, A]`, the position of each token on each axis.
      axes_dims: how many dimensions of the head rotate with each axis; all even.
      theta: base of the frequencies.

    Returns:
      Two float32 arrays `[N, sum(axes_dims) / 2]`, one angle for each interleaved pair.
    """
    ids = np.asarray(ids, np.float64)
    angles = [
        ids[:, axis, None] * theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        for axis, dim in enumerate(axes_dims)
    ]
    table = np.concatenate(angles, axis=-1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def apply_rope(x: chex.Array, cos: chex.Array, sin: chex.Array) -> chex.Array:
    """Rotates interleaved pairs (x_2j, x_2j+1) of `x [B, N, H, D]` by the angles `[N, D/2]`, in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
