"""From rewards to advantages: who did better than the samples it may be compared with.

A score may never have come. The group of that sample cannot be judged: it is left out. A mask says which came, so that
no number has to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import chex
import jax.numpy as jnp

Combination = Literal["advantages", "sum", "decoupled"]
"""How several rewards become one advantage: see `credit`."""

Over = Literal["group", "prompt", "all"]
"""The samples that a mean or a std is of: of one prompt and active step, of one prompt, or of the iteration."""

_EPS = 1e-8
_AXES = {"group": (-1,), "prompt": (-3, -1), "all": (-4, -3, -1)}


def group_advantage(
    rewards: chex.Array, mean_of: Over = "group", std_of: Over = "group", judged: chex.Array | None = None
) -> chex.Array:
    """(R - mean) / (std + 1e-8), with the sample std (n - 1): of the group both in GRPO, where G samples are a group.

    Where all rewards that a std is of are equal, the advantage is 0 exactly: in float32 their computed mean may differ
    from them by a rounding error, which the division would blow up to order 1.

    Args:
      rewards: `[..., G]`, the rewards of samples that share prompt and active step; for other sets `[P, E, R, G]`.
      mean_of: the samples that others are compared with.
      std_of: the samples by whose spread they are measured.
      judged: `[P, E]`, groups that count in sets of several; by default all.

    Returns:
      Advantages, like `rewards`.
    """

    def counted(of: Over) -> chex.Array | None:
        return None if judged is None or of == "group" else jnp.broadcast_to(judged[..., None, None], rewards.shape)

    mean = jnp.mean(rewards, _AXES[mean_of], keepdims=True, where=counted(mean_of))
    std = jnp.std(rewards, _AXES[std_of], ddof=1, keepdims=True, where=counted(std_of))
    equal = _all_equal(rewards, _AXES[std_of], counted(std_of))
    return jnp.where(equal, 0.0, (rewards - mean) / (std + _EPS))


def credit(
    rewards: Mapping[str, chex.Array],
    came: chex.Array,
    weights: Mapping[str, float],
    combination: Combination = "advantages",
    clips: Mapping[str, float] | None = None,
    mean_of: Over = "group",
    std_of: Over = "group",
) -> chex.Array:
    """Advantages of the branches' samples.

    "advantages": each reward is normalised by itself within its group, weighted and added, so that no scale drowns
    another (as in G2RPO). "sum": the weighted rewards are added, then normalised, as the reference code of
    E-GRPO does. "decoupled": as "advantages", then normalised over all samples of the iteration, so that the size of an
    update does not depend on how many rewards there are (GDPO, arXiv:2601.05242).

    The advantages of the tail strides are added (G2RPO). A group that lacks a score has advantage 0 and does not enter
    the normalisation over all samples.

    Args:
      rewards: for each reward `[P, E, R, G]`: prompts, active steps, tail strides, samples.
      came: `[P, E, R, G]`, whether a sample has all of its scores; a reward counts for nothing where it is False.
      weights: the weight of each training reward.
      combination: how they are combined.
      clips: rewards whose normalised advantage is clipped, to plus and minus so much; not for "sum".
      mean_of, std_of: what rewards are normalised by, see `group_advantage`.

    Returns:
      `[P, E, G]`.
    """
    normalised = lambda values: group_advantage(values, mean_of, std_of, complete_groups(came))
    if combination == "sum":
        total = normalised(_weighted(rewards, weights))
    else:
        bounds = {name: (clips or {}).get(name, jnp.inf) for name in weights}
        total = _weighted({name: normalised(rewards[name]).clip(-c, c) for name, c in bounds.items()}, weights)
    advantage = total.sum(axis=2)
    judged = complete_groups(came)[..., None]
    if combination == "decoupled":
        everywhere = jnp.broadcast_to(judged, advantage.shape)
        mean, std = advantage.mean(where=everywhere), advantage.std(where=everywhere, ddof=1)
        advantage = (advantage - mean) / (std + _EPS)
    return jnp.where(judged, advantage, 0.0)


def zero_spread_share(rewards: chex.Array) -> chex.Array:
    """The share of groups `[..., G]` in which all rewards are equal: they teach nothing."""
    return _all_equal(rewards, (-1,)).mean()


def complete_groups(came: chex.Array) -> chex.Array:
    """`[P, E]`: whether every sample of a group has its scores, at every tail stride of `came [P, E, R, G]`."""
    return came.all((2, 3))


def over_parts(values: chex.Array, parts: int) -> chex.Array:
    """The means `[..., parts]` of equal parts of `[..., G]`; of what is true or false, if all of a part is true."""
    apart = values.reshape(*values.shape[:-1], parts, -1)
    return apart.all(-1) if values.dtype == bool else apart.mean(-1)


def _weighted(values: Mapping[str, chex.Array], weights: Mapping[str, float]) -> chex.Array:
    return jnp.asarray(sum(weight * values[name] for name, weight in weights.items()))


def _all_equal(rewards: chex.Array, axes: tuple[int, ...], counted: chex.Array | None = None) -> chex.Array:
    largest = jnp.max(rewards, axes, keepdims=True, where=counted, initial=-jnp.inf)
    return largest == jnp.min(rewards, axes, keepdims=True, where=counted, initial=jnp.inf)
