"""From rewards to advantages: who did better than the samples it may be compared with.

A score may never have come. The group of that sample cannot be judged: it is left out. A mask says which came, so that
no number has to.
"""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Credit:
    """The choices of `credit`; the defaults are E-GRPO's, and for several rewards G2RPO's.

    Attributes:
      combination: how several rewards are combined.
      mean_of, std_of: the samples that rewards are normalised by, see `group_advantage`.
      trim: the share of each group that neither is of, see `group_advantage`.
      absolute: the weight of the absolute term; 0: there is none.
      best_of: samples of each group that train, an even number up to G; None: all.
    """

    combination: Combination = "advantages"
    mean_of: Over = "group"
    std_of: Over = "group"
    trim: float = 0.0
    absolute: float = 0.0
    best_of: int | None = None


def group_advantage(
    rewards: chex.Array,
    mean_of: Over = "group",
    std_of: Over = "group",
    judged: chex.Array | None = None,
    trim: float = 0.0,
) -> chex.Array:
    """(R - mean) / (std + 1e-8), with the sample std (n - 1): of the group both in GRPO, where G samples are a group.

    Where all rewards that a std is of are equal, the advantage is 0 exactly: in float32 their computed mean may differ
    from them by a rounding error, which the division would blow up to order 1.

    Args:
      rewards: `[..., G]`, the rewards of samples that share prompt and active step; for other sets `[P, E, R, G]`.
      mean_of: the samples that others are compared with.
      std_of: the samples by whose spread they are measured.
      judged: `[P, E]`, groups that count in sets of several; by default all.
      trim: the share of each group, its lowest rewards, that neither mean nor std is of; they are measured by the same
        (MixGRPO). Whole samples, rounded down, see `trimmed`.

    Returns:
      Advantages, like `rewards`.
    """
    lowest = trimmed(trim, rewards.shape[-1])
    typical = jnp.sort(rewards)[..., lowest:] if lowest else rewards

    def counted(of: Over) -> chex.Array | None:
        return None if judged is None or of == "group" else jnp.broadcast_to(judged[..., None, None], typical.shape)

    mean = jnp.mean(typical, _AXES[mean_of], keepdims=True, where=counted(mean_of))
    std = jnp.std(typical, _AXES[std_of], ddof=1, keepdims=True, where=counted(std_of))
    equal = _all_equal(typical, _AXES[std_of], counted(std_of))
    return jnp.where(equal, 0.0, (rewards - mean) / (std + _EPS))


def credit(
    rewards: Mapping[str, chex.Array],
    came: chex.Array,
    weights: Mapping[str, float],
    clips: Mapping[str, float] | None = None,
    how: Credit = Credit(),
) -> chex.Array:
    """Advantages of the branches' samples.

    "advantages": each reward is normalised by itself within its group, weighted and added, so that no scale drowns
    another (as in G2RPO). "sum": the weighted rewards are added, then normalised, as the reference code of
    E-GRPO does. "decoupled": as "advantages", then normalised over all samples of the iteration, so that the size of an
    update does not depend on how many rewards there are (GDPO, arXiv:2601.05242).

    What is normalised, each reward or the sum, gets an absolute term too: `absolute` times z = (R - mean)/(std + 1e-8)
    of all samples of the iteration at that stride, so that a sample gains by its prompt doing better than others (as
    in AdaGRPO, arXiv:2606.06828, and VGPO, arXiv:2512.12387, of which this is the part within one iteration).

    The advantages of the tail strides are added (G2RPO). A group that lacks a score has advantage 0 and does not enter
    the normalisation over all samples.

    At last, only the `best_of` = n samples of a group with the n/2 highest and the n/2 lowest advantages train
    (DanceGRPO's code for HunyuanVideo, arXiv:2505.07818): those of the others become 0, these are multiplied by G/n,
    so that the loss, a mean over G, is the mean over them. Among equal ones the order of the samples decides.

    Args:
      rewards: for each reward `[P, E, R, G]`: prompts, active steps, tail strides, samples.
      came: `[P, E, R, G]`, whether a sample has all of its scores; a reward counts for nothing where it is False.
      weights: the weight of each training reward.
      clips: rewards whose normalised advantage, the absolute term included, is clipped, to plus and minus so much; not
        for "sum".
      how: everything else that is a choice.

    Returns:
      `[P, E, G]`.
    """
    judged = complete_groups(came)
    normalised = lambda values: _normalised(values, judged, how)
    if how.combination == "sum":
        total = normalised(_weighted(rewards, weights))
    else:
        bounds = {name: (clips or {}).get(name, jnp.inf) for name in weights}
        total = _weighted({name: normalised(rewards[name]).clip(-c, c) for name, c in bounds.items()}, weights)
    advantage = total.sum(axis=2)
    if how.combination == "decoupled":
        everywhere = jnp.broadcast_to(judged[..., None], advantage.shape)
        mean, std = advantage.mean(where=everywhere), advantage.std(where=everywhere, ddof=1)
        advantage = (advantage - mean) / (std + _EPS)
    advantage = jnp.where(judged[..., None], advantage, 0.0)
    return advantage if how.best_of is None else _extremes(advantage, how.best_of)


def trimmed(trim: float, group_size: int) -> int:
    """The number of a group's samples that the share `trim` is, rounded down; the product's own error counts not."""
    return int(trim * group_size + 1e-6)  # 0.29 * 100 is 28.999... in binary


def running_advantage(reward: chex.Array, came: chex.Array, mean: chex.Array, std: chex.Array) -> chex.Array:
    """The part of AdaGRPO's advantage that compares with all iterations (arXiv:2606.06828).

    z = (R - mean) / (std + 1e-8), of which those above 0 are divided by their sum and those below by minus theirs, so
    that each side weighs 1 in all; where one side is empty, z less its mean.

    Args:
      reward: R, of any shape.
      came: whether it is one, like it; 0 where it is not.
      mean, std: running ones, `[]`.
    """
    z = jnp.where(came, (reward - mean) / (std + _EPS), 0.0)
    above, below = jnp.sum(z, where=z > 0), -jnp.sum(z, where=z < 0)
    sides = jnp.where(z > 0, z / jnp.where(above > 0, above, 1), z / jnp.where(below > 0, below, 1))
    centred = jnp.where(came, z - z.mean(where=came), 0.0)
    return jnp.where((above > 0) & (below > 0), sides, centred)


def spread_within(values: chex.Array) -> chex.Array:
    """The mean std within groups, `[E]`, of rewards `[P, E, R, G]`, of those groups that have all of theirs, no nan."""
    return jnp.nanmean(jnp.std(values, -1, ddof=1), (0, 2))


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


def _normalised(rewards: chex.Array, judged: chex.Array, how: Credit) -> chex.Array:
    relative = group_advantage(rewards, how.mean_of, how.std_of, judged, how.trim)
    return relative + how.absolute * group_advantage(rewards, "all", "all", judged) if how.absolute else relative


def _extremes(advantage: chex.Array, count: int) -> chex.Array:
    size = advantage.shape[-1]
    if count >= size:  # as at the upper depths of a tree
        return advantage
    rank = jnp.argsort(jnp.argsort(advantage))  # both stable: exactly `count` are kept, however many are equal
    kept = (rank < count // 2) | (rank >= size - count // 2)
    return jnp.where(kept, advantage * (size / count), 0.0)


def _weighted(values: Mapping[str, chex.Array], weights: Mapping[str, float]) -> chex.Array:
    return jnp.asarray(sum(weight * values[name] for name, weight in weights.items()))


def _all_equal(rewards: chex.Array, axes: tuple[int, ...], counted: chex.Array | None = None) -> chex.Array:
    largest = jnp.max(rewards, axes, keepdims=True, where=counted, initial=-jnp.inf)
    return largest == jnp.min(rewards, axes, keepdims=True, where=counted, initial=jnp.inf)
