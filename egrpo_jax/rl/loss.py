"""The clipped policy-ratio loss of GRPO."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax.numpy as jnp


class LossStats(NamedTuple):
    """What the loss saw, each the mean over all samples but `ratio_deviation`, the maximum of |ratio - 1|.

    `clip_high` and `clip_low` are the shares of samples whose gradient the clip cuts off above 1 + range and below
    1 - range; `kl` is the estimate r - 1 - log r of KL(old | new), for each latent dimension.
    """

    loss: chex.Array
    ratio: chex.Array
    ratio_deviation: chex.Array
    clip_high: chex.Array
    clip_low: chex.Array
    kl: chex.Array


def clipped_ratio_loss(
    log_prob: chex.Array,
    old_log_prob: chex.Array,
    advantage: chex.Array,
    clip_range: float,
    advantage_clip: float,
) -> tuple[chex.Array, LossStats]:
    """mean of max(-A r, -A clip(r, 1 - range, 1 + range)), r = exp(log_prob - old_log_prob) (E-GRPO eq. 9).

    Args:
      log_prob, old_log_prob: log-densities averaged over latent dimensions, any equal shape.
      advantage: like them; clipped to +-`advantage_clip` first.
      clip_range: how far r may move before its gradient is cut off; 1e-4 goes with averaged log-densities.

    Returns:
      The loss, a scalar, and its statistics.
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage])
    advantage = jnp.clip(advantage, -advantage_clip, advantage_clip)
    log_ratio = log_prob - old_log_prob
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
    loss = jnp.maximum(-advantage * ratio, -advantage * clipped).mean()
    stats = LossStats(
        loss=loss,
        ratio=ratio.mean(),
        ratio_deviation=jnp.abs(ratio - 1).max(),
        clip_high=((ratio > 1 + clip_range) & (advantage > 0)).mean(),
        clip_low=((ratio < 1 - clip_range) & (advantage < 0)).mean(),
        kl=(jnp.expm1(log_ratio) - log_ratio).mean(),
    )
    return loss, stats
