"""Two models judged on the same prompts: means, paired changes and win rates with their intervals, and the table.

Intervals are 95 % percentile bootstrap intervals over prompts, of resamples that are the same in every run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from egrpo_jax.rewards import Scores

RESAMPLES = 10_000
SEED = 0
_AT_ONCE = 2**20
"""Most drawn values in memory at once."""


class Estimate(NamedTuple):
    """A mean and its 95 % interval: nan for one value, which says nothing about others; for none, the mean too."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One score over a set of prompts.

    Attributes:
      name: of the score.
      role: what it is to the tuned model: "train", "held out", or "within a prompt", as a diversity is.
      prompts: how many count: those that have all their scores.
      missing: how many do not.
      base: the base model's mean over the prompts.
      tuned, change, win_rate: the tuned model's mean, the mean of its paired differences from the base, and the share
        of prompts where it is better, ties counting half; None where there is no tuned model.
    """

    name: str
    role: str
    prompts: int
    missing: int
    base: Estimate
    tuned: Estimate | None = None
    change: Estimate | None = None
    win_rate: Estimate | None = None


def bootstrap(values: np.ndarray) -> list[Estimate]:
    """Each column's mean over the prompts; all columns are resampled together.

    Args:
      values: `[P, C]`, finite.
    """
    count, columns = values.shape
    if count < 2:
        means = values[0] if count else np.full(columns, math.nan)
        return [Estimate(float(mean), math.nan, math.nan) for mean in means]
    low, high = scipy.stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, _AT_ONCE // values.size),
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return [Estimate(*map(float, estimate)) for estimate in zip(values.mean(0), low, high, strict=True)]


def compare(name: str, role: str, base: Scores, tuned: Scores | None) -> Comparison:
    """The statistics of one score.

    Args:
      base: `[P, S]`, of S images of each prompt; a prompt that lacks one is left out.
      tuned: of the tuned model, for the same prompts and noise; None if there is none.
    """
    models = [scores for scores in (base, tuned) if scores is not None]
    came = np.all([scores.came.all(1) for scores in models], axis=0)
    means = np.stack([scores.values[came].mean(1, dtype=np.float64) for scores in models], axis=1)
    counts = (name, role, len(means), int((~came).sum()))
    if tuned is None:
        return Comparison(*counts, *bootstrap(means))
    change = means[:, 1] - means[:, 0]
    wins = (np.sign(change) + 1) / 2
    return Comparison(*counts, *bootstrap(np.column_stack([means, change, wins])))


def paired_change(before: Scores, after: Scores) -> Estimate:
    """The mean change of scores `[P]` of the same prompts, of those that have both."""
    came = before.came & after.came
    return bootstrap((after.values[came].astype(np.float64) - before.values[came])[:, None])[0]


def diversity(features: np.ndarray) -> np.ndarray:
    """Mean cosine distance `[P]` over the pairs of a prompt's images, in [0, 2]; 0 where all are the same.

    Args:
      features: `[P, S, F]`, vectors of length 1, S at least 2.
    """
    features = np.asarray(features, np.float64)
    samples = features.shape[1]
    # The sum over pairs of cosines, from the square of the sum of vectors.
    twice = (features.sum(1) ** 2).sum(-1) - (features**2).sum((1, 2))
    return 1 - twice / (samples * (samples - 1))


def as_json(comparison: Comparison) -> dict[str, Any]:
    """`comparison` as strict JSON has it: nan is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Estimate):
            return {key: plain(number) for key, number in value._asdict().items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    return {field.name: plain(getattr(comparison, field.name)) for field in dataclasses.fields(comparison)}


def markdown(comparisons: Sequence[Comparison]) -> str:
    """A table with a line for each score, intervals in brackets; without a tuned model, of the base model's means."""
    tuned = any(row.tuned is not None for row in comparisons)
    head = ["score", "role", "base", *(["tuned", "change", "win rate"] if tuned else []), "prompts", "missing"]
    rows = [[row.name, row.role, *_numbers(row), str(row.prompts), str(row.missing)] for row in comparisons]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _numbers(row: Comparison) -> list[str]:
    styles = (row.base, ".4f"), (row.tuned, ".4f"), (row.change, "+.4f"), (row.win_rate, ".1%")
    return [_show(estimate, style) for estimate, style in styles if estimate is not None]


def _show(estimate: Estimate, style: str) -> str:
    if math.isnan(estimate.mean):
        return "none"
    if math.isnan(estimate.low):
        return f"{estimate.mean:{style}} [none]"
    return f"{estimate.mean:{style}} [{estimate.low:{style}}, {estimate.high:{style}}]"
