"""The encoder of T5 v1.1 as a pure Flax Linen module.

T5 is Raffel et al., 2020 (arXiv:1910.10683), its gated feed-forward part Shazeer, 2020 (arXiv:2002.05202). No layer
has a bias, norms divide by the root mean square alone, attention logits are not scaled, and positions enter only as a
bias on these logits, which depends on the distance of query and key and is one and the same in every block.
As FLUX.1 uses it, padding is attended to: states depend on the length that a prompt is padded to.
Blocks are scanned: compile time does not grow with depth, and their parameters carry a leading layer axis.
"""

from __future__ import annotations

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.models.layers import Dtype, in_float32, scan_blocks


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of an encoder; the defaults are T5 v1.1 XXL (4,762,310,656 parameters).

    Attributes:
      vocab_size, width, num_layers, num_heads, head_dim, mlp_dim: as in any transformer; heads need not fill the width.
      num_buckets: how many distances the position bias tells apart, half of them for keys after the query.
      max_distance: from here on all distances share a bucket.
    """

    vocab_size: int = 32_128
    width: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    head_dim: int = 64
    mlp_dim: int = 10_240
    num_buckets: int = 32
    max_distance: int = 128


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of every pair of query and key, int32 `[length, length]`.

    Half of the buckets are for keys after the query. Of each half, the first half are for one distance each, the
    others for ranges that grow as powers up to `max_distance`.
    """
    positions = np.arange(length, dtype=np.int32)
    offsets = positions[None, :] - positions[:, None]
    one_side = num_buckets // 2
    exact = one_side // 2
    distances = np.abs(offsets)
    # Rounded as in the published code, and on the host: some distances lie on the edge of a bucket.
    logs = np.log(np.maximum(distances, 1).astype(np.float32) / np.float32(exact))
    ranges = (logs / np.float32(np.log(max_distance / exact)) * np.float32(one_side - exact)).astype(np.int32)
    buckets = np.where(distances < exact, distances, np.minimum(exact + ranges, one_side - 1))
    return buckets + one_side * (offsets > 0).astype(np.int32)


class Block(nn.Module):
    """Self-attention, then a gated feed-forward part, each on the normalised stream and added to it."""

    config: T5Config
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: chex.Array, bias: chex.Array) -> tuple[chex.Array, None]:
        config = self.config
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def linear(features: int, name: str) -> nn.Dense:
            return nn.Dense(features, use_bias=False, name=name, **common)

        hidden = nn.RMSNorm(1e-6, name="attention_norm", **common)(x)
        inner = config.num_heads * config.head_dim
        query, key, value = (
            linear(inner, name)(hidden).reshape(*x.shape[:2], config.num_heads, config.head_dim)
            for name in ("to_q", "to_k", "to_v")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, bias, scale=1.0)
        x = x + linear(config.width, "out")(mixed.reshape(*x.shape[:2], inner))

        hidden = nn.RMSNorm(1e-6, name="mlp_norm", **common)(x)
        gate, up = (linear(config.mlp_dim, name)(hidden) for name in ("mlp_gate", "mlp_in"))
        gated = in_float32(lambda gate, up: nn.gelu(gate, approximate=True) * up, gate, up)
        return x + linear(config.width, "mlp_out")(gated), None


class T5Encoder(nn.Module):
    """The encoder of T5 v1.1.

    Attributes:
      config: the sizes.
      dtype: what it computes in and returns; float16 overflows.
      param_dtype: what the parameters are stored in.
    """

    config: T5Config
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: chex.Array) -> chex.Array:
        """States `[B, L, width]`, in `dtype`, of token `ids [B, L]`, all of which are attended to."""
        config = self.config
        chex.assert_rank(ids, 2)
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        x = nn.Embed(config.vocab_size, config.width, name="tokens", **common)(ids)
        table = self.param(
            "relative_bias", nn.initializers.normal(0.02), (config.num_buckets, config.num_heads), self.param_dtype
        )
        buckets = relative_buckets(ids.shape[1], config.num_buckets, config.max_distance)
        bias = table.astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]  # [1, H, L, L]
        blocks = scan_blocks(Block, config.num_layers)
        x, _ = blocks(config, name="blocks", **common)(x, bias)
        return nn.RMSNorm(1e-6, name="final_norm", **common)(x)


def forward_flops(config: T5Config, tokens: int) -> int:
    """Floating-point operations of the encoder over one sequence; lookups and norms cost none."""
    inner = config.num_heads * config.head_dim
    linear = 2 * tokens * config.width * (4 * inner + 3 * config.mlp_dim)
    return config.num_layers * (linear + 4 * tokens**2 * inner)
