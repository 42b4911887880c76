"""From rewards to advantages: who did better than the samples it may be compared with."""

from __future__ import annotations

from collections.abc import Mapping

import chex
import jax.numpy as jnp


def group_advantage(rewards: chex.Array) -> chex.Array:
    """(R - mean) / (std + 1e-8) over the last axis, with the sample std (G - 1), as in GRPO.

    A group of equal rewards has advantage 0 exactly: in float32 its computed mean may differ from its members by a
    rounding error, which the division would blow up to order 1.

    Args:
      rewards: `[..., G]`, the rewards of samples that share prompt and active step.

    Returns:
      Advantages `[..., G]`.
    """
    mean = rewards.mean(-1, keepdims=True)
    std = rewards.std(-1, ddof=1, keepdims=True)
    return jnp.where(_all_equal(rewards), 0.0, (rewards - mean) / (std + 1e-8))


def credit(rewards: Mapping[str, chex.Array], weights: Mapping[str, float]) -> chex.Array:
    """Advantages of the branches' samples.

    Each reward is normalised by itself within its group, weighted and added, so that no scale drowns another; the
    advantages of the tail strides are added too (G2RPO).

    Args:
      rewards: for each reward `[P, E, R, G]`: prompts, active steps, tail strides, samples.
      weights: the weight of each reward that is trained on.

    Returns:
      `[E, P, G]`, the layout of `Transitions`.
    """
    total = sum(weight * group_advantage(rewards[name]).sum(axis=2) for name, weight in weights.items())
    return jnp.swapaxes(jnp.asarray(total), 0, 1)


def zero_spread_share(rewards: chex.Array) -> chex.Array:
    """The share of groups `[..., G]` in which all rewards are equal: they teach nothing."""
    return _all_equal(rewards).mean()


def _all_equal(rewards: chex.Array) -> chex.Array:
    """`[..., 1]`; False where a reward is nan, so that it shows."""
    return rewards.max(-1, keepdims=True) == rewards.min(-1, keepdims=True)
