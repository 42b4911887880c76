"""From rewards to advantages: who did better than the samples it may be compared with.

A reward is nan where no score came. The group of that sample cannot be judged: it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import chex
import jax.numpy as jnp

Combination = Literal["advantages", "sum", "decoupled"]
"""How several rewards become one advantage: see `credit`."""

_EPS = 1e-8


def group_advantage(rewards: chex.Array) -> chex.Array:
    """(R - mean) / (std + 1e-8) over the last axis, with the sample std (G - 1), as in GRPO.

    A group of equal rewards has advantage 0 exactly: in float32 its computed mean may differ from its members by a
    rounding error, which the division would blow up to order 1.

    Args:
      rewards: `[..., G]`, the rewards of samples that share prompt and active step.

    Returns:
      Advantages `[..., G]`; nan throughout a group with a nan.
    """
    mean = rewards.mean(-1, keepdims=True)
    std = rewards.std(-1, ddof=1, keepdims=True)
    return jnp.where(_all_equal(rewards), 0.0, (rewards - mean) / (std + _EPS))


def credit(
    rewards: Mapping[str, chex.Array],
    weights: Mapping[str, float],
    combination: Combination = "advantages",
    clips: Mapping[str, float] | None = None,
) -> chex.Array:
    """Advantages of the branches' samples.

    "advantages": each reward is normalised by itself within its group, weighted and added, so that no scale drowns
    another (as in G2RPO). "sum": the weighted rewards are added, then normalised, as the reference code of
    E-GRPO does. "decoupled": as "advantages", then normalised over all samples of the iteration, so that the size of an
    update does not depend on how many rewards there are (GDPO, arXiv:2601.05242).

    The advantages of the tail strides are added (G2RPO). A group that lacks a score has advantage 0 and does not enter
    the normalisation over all samples; if every group does, the advantages are nan: there is nothing to learn from.

    Args:
      rewards: for each reward `[P, E, R, G]`: prompts, active steps, tail strides, samples.
      weights: the weight of each reward that is trained on.
      combination: how they are combined.
      clips: rewards whose normalised advantage is clipped, to plus and minus so much; not for "sum".

    Returns:
      `[E, P, G]`, the layout of `Transitions`.
    """
    if combination == "sum":
        total = group_advantage(_weighted(rewards, weights))
    else:
        bounds = {name: (clips or {}).get(name, jnp.inf) for name in weights}
        total = _weighted({name: group_advantage(rewards[name]).clip(-c, c) for name, c in bounds.items()}, weights)
    advantage = jnp.swapaxes(total.sum(axis=2), 0, 1)
    if combination == "decoupled":
        advantage = (advantage - jnp.nanmean(advantage)) / (jnp.nanstd(advantage, ddof=1) + _EPS)
    left_out = jnp.isnan(advantage)
    return jnp.where(left_out & ~left_out.all(), 0.0, advantage)


def zero_spread_share(rewards: chex.Array) -> chex.Array:
    """The share of groups `[..., G]` in which all rewards are equal: they teach nothing."""
    return _all_equal(rewards).mean()


def groups_left_out(rewards: Mapping[str, chex.Array]) -> chex.Array:
    """How many of the groups `[P, E]` of `rewards`, each `[P, E, R, G]`, lack a score."""
    missing = jnp.stack([jnp.isnan(values).any((2, 3)) for values in rewards.values()])
    return missing.any(0).sum()


def _weighted(values: Mapping[str, chex.Array], weights: Mapping[str, float]) -> chex.Array:
    return jnp.asarray(sum(weight * values[name] for name, weight in weights.items()))


def _all_equal(rewards: chex.Array) -> chex.Array:
    """`[..., 1]`; False where a reward is nan, so that it shows."""
    return rewards.max(-1, keepdims=True) == rewards.min(-1, keepdims=True)
