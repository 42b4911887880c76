r"""The policy-ratio losses of GRPO, of each sample and of all."""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax.numpy as jnp


class LossStats(NamedTuple):
    """Statistics of the loss, each the weighted sum over samples but `ratio_deviation`, the maximum of |r - 1|.

    `ratio_excess` is r - 1, whose sum rounds less than that of r; `clip_high` and `clip_low` are the shares of samples
    whose gradient the loss cuts off above and below r = 1; `kl` is the estimate q - 1 - log q of KL(old | new), for
    each latent dimension, q being the ratio of the densities, as r is but for weights of steps; `penalty` is the part
    of the loss for the distance from copies of the parameters.
    """

    loss: chex.Array
    ratio_excess: chex.Array
    ratio_deviation: chex.Array
    clip_high: chex.Array
    clip_low: chex.Array
    kl: chex.Array
    penalty: chex.Array


class SampleLoss(NamedTuple):
    """The loss of each sample, and which samples have no gradient any more for a ratio above, or below, 1."""

    loss: chex.Array
    cut_high: chex.Array
    cut_low: chex.Array


def clipped_ratio_loss(ratio: chex.Array, advantage: chex.Array, clip_range: float) -> SampleLoss:
    r"""The negated clipped objective of PPO, as GRPO for flows has it (E-GRPO, arXiv:2601.00423, eq. 9).

        l = max(-A r, -A min(max(r, 1 - eps), 1 + eps)).

    Where r leaves [1 - eps, 1 + eps] in the direction that A asks for, the sample has no gradient any more.

    Args:
      ratio: r, of the policy to the one that sampled; any shape.
      advantage: A, how much better a sample is than those it may be compared with. Same shape.
      clip_range: eps; 1e-4 goes with log-densities that are averaged over latent dimensions.
    """
    chex.assert_equal_shape([ratio, advantage])
    clipped = jnp.clip(ratio, 1 - clip_range, 1 + clip_range)
    return SampleLoss(
        loss=jnp.maximum(-advantage * ratio, -advantage * clipped),
        cut_high=(ratio > 1 + clip_range) & (advantage > 0),
        cut_low=(ratio < 1 - clip_range) & (advantage < 0),
    )


def kl_masked_loss(ratio: chex.Array, advantage: chex.Array, kl: chex.Array, kl_limit: float) -> SampleLoss:
    r"""The objective of Flow-DPPO, negated: a trust region in the place of the clip (arXiv:2606.11025).

        l = -A r,  and 0 where KL >= delta and r is above 1 with A > 0, or below 1 with A < 0.

    Args:
      ratio: r, of the policy to the one that sampled; any shape.
      advantage: A. Same shape.
      kl: KL between the two, averaged over latent dimensions; broadcasts to `ratio`. No gradient flows through it.
      kl_limit: delta; 1e-5 in the published code.
    """
    chex.assert_equal_shape([ratio, advantage])
    beyond = kl >= kl_limit
    cut_high, cut_low = beyond & (ratio > 1) & (advantage > 0), beyond & (ratio < 1) & (advantage < 0)
    return SampleLoss(jnp.where(cut_high | cut_low, 0.0, -advantage * ratio), cut_high, cut_low)


def total_loss(
    samples: SampleLoss,
    ratio: chex.Array,
    log_ratio: chex.Array,
    weight: chex.Array | None = None,
    step_weight: chex.Array | float = 1.0,
) -> tuple[chex.Array, LossStats]:
    """The loss sum_i w_i f_i l_i of samples i, and statistics, which are weighted by w_i alone.

    Args:
      samples: l_i; any shape.
      ratio: r_i, that l_i is of. Same shape.
      log_ratio: of the densities, averaged over latent dimensions. Same shape.
      weight: w_i, broadcastable to the samples; by default 1/n for each of n. A sample of weight 0 does not exist.
      step_weight: f_i, broadcastable to the samples; see `Plan.step_weights`.
    """
    weight = jnp.broadcast_to(1 / ratio.size if weight is None else weight, ratio.shape)
    total = lambda values: jnp.sum(weight * values, where=weight > 0)
    loss = total(step_weight * samples.loss)
    stats = LossStats(
        loss=loss,
        ratio_excess=total(ratio - 1),
        ratio_deviation=jnp.max(jnp.abs(ratio - 1), initial=0.0, where=weight > 0),
        clip_high=total(samples.cut_high),
        clip_low=total(samples.cut_low),
        kl=total(jnp.expm1(log_ratio) - log_ratio),
        penalty=jnp.zeros(()),
    )
    return loss, stats
