r"""The clipped policy-ratio loss of GRPO."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax.numpy as jnp


class LossStats(NamedTuple):
    """Statistics of the loss, each the weighted sum over samples but `ratio_deviation`, the maximum of |r - 1|.

    `ratio_excess` is r - 1, whose sum rounds less than that of r; `clip_high` and `clip_low` are the shares of samples
    whose gradient the clip cuts off above 1 + range and below 1 - range; `kl` is the estimate r - 1 - log r of
    KL(old | new), for each latent dimension.
    """

    loss: chex.Array
    ratio_excess: chex.Array
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
    weight: chex.Array | None = None,
) -> tuple[chex.Array, LossStats]:
    r"""The negated clipped objective of PPO, as GRPO for flows has it (E-GRPO, arXiv:2601.00423, eq. 9).

    With r_i = exp(log p_i - log p_old,i) and A_i cut to [-c, c], over samples i of weight w_i

        L = sum_i w_i max(-A_i r_i, -A_i min(max(r_i, 1 - eps), 1 + eps)).

    Where r_i leaves [1 - eps, 1 + eps] in the direction that A_i asks for, the sample has no gradient any more.

    Args:
      log_prob: log p_i, the density of sample i under the parameters that are trained, averaged over latent
        dimensions; any shape.
      old_log_prob: log p_old,i, that under the parameters it was drawn with; no gradient flows through it. Same shape.
      advantage: A_i, how much better than the samples it may be compared with. Same shape.
      clip_range: eps; 1e-4 goes with averaged log-densities.
      advantage_clip: c.
      weight: w_i, broadcastable to the samples; by default 1/n for each of n. A sample of weight 0 does not exist.

    Returns:
      L, a scalar, and its statistics.
    """
    chex.assert_equal_shape([log_prob, old_log_prob, advantage])
    weight = jnp.broadcast_to(1 / advantage.size if weight is None else weight, advantage.shape)
    advantage = jnp.clip(advantage, -advantage_clip, advantage_clip)
    log_ratio = log_prob - old_log_prob
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
    total = lambda values: jnp.sum(weight * values, where=weight > 0)
    loss = total(jnp.maximum(-advantage * ratio, -advantage * clipped))
    stats = LossStats(
        loss=loss,
        ratio_excess=total(ratio - 1),
        ratio_deviation=jnp.max(jnp.abs(ratio - 1), initial=0.0, where=weight > 0),
        clip_high=total((ratio > 1 + clip_range) & (advantage > 0)),
        clip_low=total((ratio < 1 - clip_range) & (advantage < 0)),
        kl=total(jnp.expm1(log_ratio) - log_ratio),
    )
    return loss, stats
