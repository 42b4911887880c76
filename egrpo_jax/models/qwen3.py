"""Qwen3 (Qwen team, 2025, arXiv:2505.09388) as a text encoder: a pure Flax Linen module.

Text-to-image models take the states of a prompt's tokens between the layers of the language model: FLUX.2-klein those
after 9, 18 and 27 of 36, Z-Image those after 35. What comes later, the norm at the end and the head among it, is not in
the parameter tree. No layer has a bias; each head of keys and values serves several of the queries.
Blocks are scanned: compile time does not grow with depth, and their parameters carry a leading layer axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import chex
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from egrpo_jax.models.attention import attention, rope_table
from egrpo_jax.models.layers import Dtype, Linear, scan_blocks, swiglu


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Sizes of a Qwen3 language model; the defaults are Qwen3-4B (4,022,468,096 parameters, its head being tied).

    Attributes:
      vocab_size, width, num_layers, num_heads, head_dim, mlp_dim: as in any transformer; heads need not fill the width.
      num_kv_heads: heads of keys and values, each of which serves `num_heads / num_kv_heads` of the queries.
      theta: base of the rotary frequencies.
    """

    vocab_size: int = 151_936
    width: int = 2560
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    mlp_dim: int = 9728
    theta: float = 1_000_000.0

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: its halves are rotated together")


def forward_flops(config: Qwen3Config, tokens: int, layers: Sequence[int]) -> int:
    """Floating-point operations of the states after `layers` of one sequence; the causal mask saves none."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linear = 2 * tokens * config.width * (2 * queries + 2 * keys + 3 * config.mlp_dim)
    return max(layers) * (linear + 4 * tokens**2 * queries)


def rotate_halves(x: chex.Array, cos: chex.Array, sin: chex.Array) -> chex.Array:
    """Rotates the pairs (x_j, x_(j + head_dim / 2)) of `x [B, N, H, head_dim]` by angles `[N, head_dim / 2]`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Block(nn.Module):
    """Causal self-attention, then a gated feed-forward part, each on the normalised stream and added to it.

    Attributes:
      config: the sizes.
      layers: the numbers of the blocks, from 1, whose states are kept.
    """

    config: Qwen3Config
    layers: tuple[int, ...]
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self,
        carry: tuple[chex.Array, chex.Array, chex.Array],
        mask: chex.Array,
        rope: tuple[chex.Array, chex.Array],
    ) -> tuple[tuple[chex.Array, chex.Array, chex.Array], None]:
        x, kept, number = carry
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        hidden = nn.RMSNorm(1e-6, name="attention_norm", **common)(x)
        x = x + Linear(self.config.width, False, name="out", **common)(self._attend(hidden, mask, rope))

        hidden = nn.RMSNorm(1e-6, name="mlp_norm", **common)(x)
        gate, up = (Linear(self.config.mlp_dim, False, name=name, **common)(hidden) for name in ("mlp_gate", "mlp_in"))
        x = x + Linear(self.config.width, False, name="mlp_out", **common)(swiglu(gate, up))

        number = number + 1
        taken = (number == np.array(self.layers))[:, None]
        return (x, jnp.where(taken, x[:, :, None], kept), number), None

    def _attend(self, hidden: chex.Array, mask: chex.Array, rope: tuple[chex.Array, chex.Array]) -> chex.Array:
        """Attention of `hidden [B, L, width]` to itself, heads joined: `[B, L, num_heads * head_dim]`."""
        config, common = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def heads(name: str, count: int) -> chex.Array:
            projected = Linear(count * config.head_dim, False, name=name, **common)(hidden)
            return projected.reshape(*hidden.shape[:2], count, config.head_dim)

        query = nn.RMSNorm(1e-6, name="norm_q", **common)(heads("to_q", config.num_heads))
        key = nn.RMSNorm(1e-6, name="norm_k", **common)(heads("to_k", config.num_kv_heads))
        rotated, value = rotate_halves(key, *rope), heads("to_v", config.num_kv_heads)
        key, value = (jnp.repeat(x, config.num_heads // config.num_kv_heads, axis=2) for x in (rotated, value))
        return attention(rotate_halves(query, *rope), key, value, mask).reshape(*hidden.shape[:2], -1)


class Qwen3(nn.Module):
    """States of a prompt's tokens between the layers of Qwen3.

    Attributes:
      config: the sizes.
      layers: after how many layers states are taken, as `hidden_states[k]` of transformers; only the first
        `max(layers)` are in the parameter tree. Z-Image: (35,).
      dtype: what it computes in and returns.
      param_dtype: what the parameters are stored in.
    """

    config: Qwen3Config
    layers: tuple[int, ...] = (9, 18, 27)
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: chex.Array, mask: chex.Array | None = None) -> chex.Array:
        """Encodes tokens at positions 0 to L - 1, each of which attends to itself and what is before it.

        Args:
          ids: `[B, L]`.
          mask: boolean `[B, L]`, False where a token is padding, which none attends to. Padding is at the end; None:
            there is none.

        Returns:
          `[B, L, len(layers) * width]`, in `dtype`: for each token, padding included, its states in the order of
          `layers`; not normalised.

        Raises:
          ValueError: `layers` is empty, or a number in it is not between 1 and `num_layers - 1`: transformers norms
            the states after the last.
        """
        config = self.config
        chex.assert_rank(ids, 2)
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        chex.assert_equal_shape([ids, mask])
        if not self.layers or not all(0 < layer < config.num_layers for layer in self.layers):
            raise ValueError(f"layers {self.layers} must be one or more from 1 to {config.num_layers - 1}")
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        length = ids.shape[1]
        allowed = np.tri(length, dtype=bool) & mask[:, None, None, :]  # [B, 1, L, L]
        rope = rope_table(np.arange(length)[:, None], (config.head_dim,), config.theta)
        x = nn.Embed(config.vocab_size, config.width, name="tokens", **common)(ids)
        kept = jnp.zeros((*ids.shape, len(self.layers), config.width), x.dtype)
        blocks = scan_blocks(Block, max(self.layers))(config, self.layers, name="blocks", **common)
        (_, kept, _), _ = blocks((x, kept, jnp.zeros((), jnp.int32)), allowed, rope)
        return kept.reshape(*ids.shape, -1)
