"""Attention and rotary position embeddings, shared by every transformer here."""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np


def attention(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array | None = None) -> chex.Array:
    """Softmax attention, scaled by 1/sqrt(head_dim), with float32 softmax.

    By cuDNN's fused kernel where the default device, the dtype and `head_dim` allow and there is no mask; by XLA, which
    holds all `[B, H, N, M]` weights, elsewhere.

    Args:
      query: `[B, N, H, head_dim]`.
      key, value: `[B, M, H, head_dim]`.
      mask: boolean, broadcastable to `[B, H, N, M]`; False positions are not attended to.

    Returns:
      `[B, N, H, head_dim]`, in the dtype of `value`.
    """
    if mask is None and _cudnn_takes(query):
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    return _xla_attention(query, key, value, mask)


def _cudnn_takes(query: chex.Array) -> bool:
    """Tells whether cuDNN has a fused kernel for heads like these on the default device (NVIDIA, Ampere and newer)."""
    device = jax.devices()[0]
    return (
        device.device_kind.startswith("NVIDIA")
        and float(device.compute_capability) >= 8.0
        and query.dtype in (jnp.bfloat16, jnp.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 128
    )


def _xla_attention(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array | None) -> chex.Array:
    logits = jnp.einsum("bnhd,bmhd->bhnm", query, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, -0.7 * jnp.finfo(jnp.float32).max)  # finite: a row may be masked altogether
    # Divided by the sum last: neither this pass nor its backward then normalises the large [N, N] array.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    mixed = jnp.einsum("bhnm,bmhd->bhnd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (mixed / weights.sum(-1, keepdims=True)).swapaxes(1, 2).astype(value.dtype)


def rope_table(ids: np.ndarray, axes_dims: Sequence[int], theta: float = 10_000.0) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine tables of the rotary embedding of several position axes.

    Computed in float64 on the host, as the published model does: float32 angles lose digits at high positions.

    Args:
      ids: `[N, axes]`, the position of each token on each axis.
      axes_dims: how many dimensions of the head rotate with each axis; all even, `head_dim` together.
      theta: base of the frequencies.

    Returns:
      Two float32 arrays `[N, head_dim / 2]`, one angle for each interleaved pair.
    """
    ids = np.asarray(ids, np.float64)
    angles = [
        ids[:, axis, None] * theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        for axis, dim in enumerate(axes_dims)
    ]
    table = np.concatenate(angles, axis=-1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def apply_rope(x: chex.Array, cos: chex.Array, sin: chex.Array) -> chex.Array:
    """Rotates interleaved pairs (x_2j, x_2j+1) of `x [B, N, H, head_dim]` by angles `[N, head_dim / 2]`, in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
