"""Statistics of replicates, each with the 95 % interval of the jackknife.

A replicate is a rollout with noise of its own. Every estimate is a function of all of them; without each one in turn it
comes out a little different, and from that follows how far it may be off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.stats


class Estimate(NamedTuple):
    """A number and its 95 % interval; nan where there is nothing to tell it from."""

    value: float
    low: float
    high: float


def jackknife(replicates: int, estimate: Callable[[np.ndarray], float]) -> Estimate:
    """`estimate` of all replicates, and its interval.

    Args:
      replicates: n; of one alone there is no interval.
      estimate: a number from the indices of those that count.
    """
    every = np.arange(replicates)
    value = estimate(every)
    if replicates < 2:
        return Estimate(value, math.nan, math.nan)
    without = np.array([estimate(np.delete(every, index)) for index in every])
    error = math.sqrt((replicates - 1) * without.var())
    half = float(scipy.stats.t.ppf(0.975, replicates - 1)) * error
    return Estimate(value, value - half, value + half)


def pairs(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Odd and even parts `[..., G / 2]` of scores `[..., G]`, of which each second has the noise of the one before it,
    with the other sign."""
    one, other = scores[..., ::2], scores[..., 1::2]
    return (one - other) / 2, (one + other) / 2


def variances(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variance of the odd part, whose mean is 0, and of the even part, of every group: of `[..., G]` each `[...]`."""
    odd, even = pairs(scores)
    return (odd**2).mean(-1), even.var(-1, ddof=1)


def spread(scores: np.ndarray) -> Estimate:
    """The standard deviation within groups of scores `[n, P, G]`."""
    odd, even = variances(scores)
    return jackknife(len(scores), lambda kept: math.sqrt(np.mean(odd[kept] + even[kept])))


def odd_share(scores: np.ndarray) -> Estimate:
    """The share of the variance within groups of scores `[n, P, G]` that changes its sign with the noise."""
    odd, even = variances(scores)

    def share(kept: np.ndarray) -> float:
        total = odd[kept].mean() + even[kept].mean()
        return float(odd[kept].mean() / total) if total else math.nan

    return jackknife(len(scores), share)


def correlation(first: np.ndarray, second: np.ndarray) -> Estimate:
    """The correlation of two scores `[n, P, G]` within groups."""
    x, y = (scores - scores.mean(-1, keepdims=True) for scores in (first, second))
    products = [(a * b).sum((1, 2)) for a, b in ((x, y), (x, x), (y, y))]

    def of(kept: np.ndarray) -> float:
        xy, xx, yy = (product[kept].sum() for product in products)
        return float(xy / math.sqrt(xx * yy)) if xx and yy else math.nan

    return jackknife(len(first), of)


def rank_correlation(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Spearman's correlation of two scores `[n, ..., G]` within groups, the mean over these.

    A group without a spread in either counts as 0: it says nothing about who is better.
    """
    ranks = [scipy.stats.rankdata(scores, axis=-1) for scores in (first, second)]
    x, y = (rank - rank.mean(-1, keepdims=True) for rank in ranks)
    scale = np.sqrt((x**2).sum(-1) * (y**2).sum(-1))
    of_groups = np.divide((x * y).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0)
    of_replicates = of_groups.reshape(len(first), -1).mean(1)
    return jackknife(len(first), lambda kept: float(of_replicates[kept].mean()))


class Agreement(NamedTuple):
    """The agreement of the policy gradients of independent rollouts.

    Attributes:
      ratio: of signal to noise, E<g1, g2> / (E|g|^2 - E<g1, g2>): |E g|^2 by the variance of g.
      norm: the root mean square of |g|.
    """

    ratio: Estimate
    norm: float


def agreement(squares: np.ndarray, with_sum: np.ndarray, square_of_sum: float) -> Agreement:
    """From n gradients, by products alone: |g_i|^2 `[n]`, <g_i, S> `[n]` and |S|^2 of their sum S."""

    def ratio(kept: np.ndarray) -> float:
        (left,) = np.setdiff1d(np.arange(len(squares)), kept).tolist() or (None,)
        whole = square_of_sum if left is None else square_of_sum - 2 * with_sum[left] + squares[left]
        count = len(kept)
        if count < 2:
            return math.nan
        together = (whole - squares[kept].sum()) / (count * (count - 1))
        noise = squares[kept].mean() - together
        return float(together / noise) if noise > 0 else math.nan

    return Agreement(jackknife(len(squares), ratio), math.sqrt(squares.mean()))
