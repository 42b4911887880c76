"""A plan whose noise follows the rewards: steps of little effect get more of it, at the expense of the others.

Entropy says how far apart the samples of a step are as latents. What a group is compared by is their rewards, and the
same entropy may move these much at one step and hardly at another. Every so many iterations each step's std is
multiplied by the square root of how far its spread of rewards, the std within groups since the last time, is below the
geometric mean of all steps. Then all are scaled together: the sum of the steps' entropies stays that of the config, and
no step leaves half to twice its noise there, nor the noise level at its end. No paper has this schedule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from egrpo_jax.flow.entropy import exp_entropy_of
from egrpo_jax.rl.plan import AnchorPlan, Plan

REACH = 2.0
"""No step has more than so many times its first noise, or less than a so-manieth."""
LEAST = 1e-3
"""Of the largest spread: a step with less counts as if it had this."""


class Memory(NamedTuple):
    """The state of an `AdaptivePlan`, of its E steps each.

    Attributes:
      noise: standard deviations.
      spread: sums of spreads of rewards since they last changed.
      seen: iterations in these.
      iterations: since they last changed.
    """

    noise: tuple[float, ...]
    spread: tuple[float, ...]
    seen: tuple[int, ...]
    iterations: int

    @classmethod
    def read(cls, values: Sequence[Any]) -> Memory:
        """The memory that JSON has made lists of."""
        noise, spread, seen, iterations = values
        return cls(tuple(noise), tuple(spread), tuple(seen), iterations)


@dataclasses.dataclass(frozen=True)
class AdaptivePlan(AnchorPlan):
    """A plan of single steps of the exact kernel, whose standard deviations are numbers of its schedule.

    Attributes:
      every: iterations between two changes.
    """

    every: int = 1

    def schedule(self) -> np.ndarray:
        """The standard deviations, `[E]`."""
        return np.array([branch.noise for branch in self.branches], np.float32)

    def shares_code(self, other: Plan) -> bool:
        """If its steps are the same, whatever their noise."""
        quiet = lambda plan: dataclasses.replace(plan, branches=tuple(branch.step for branch in plan.branches))
        return isinstance(other, AdaptivePlan) and quiet(self) == quiet(other)

    def at(self, memory: Memory) -> AdaptivePlan:
        """The plan with the noise of `memory`."""
        branches = tuple(
            dataclasses.replace(branch, noise=noise, exp_entropy=exp_entropy_of(noise))
            for branch, noise in zip(self.branches, memory.noise, strict=True)
        )
        return dataclasses.replace(self, branches=branches)

    def begin(self) -> Memory:
        """The memory before the first iteration; the plan is the config's own."""
        return _anew(np.array([branch.noise for branch in self.branches]))

    def learn(self, memory: Memory, spread: np.ndarray) -> Memory:
        """`memory` after an iteration; the plan is the config's own.

        Args:
          memory: before it.
          spread: of each step `[E]`, the mean std of rewards within its groups; nan where none came.
        """
        came = np.isfinite(spread)
        total = np.array(memory.spread) + np.where(came, spread, 0)
        seen = np.array(memory.seen) + came
        if memory.iterations + 1 < self.every:
            return Memory(memory.noise, _floats(total), tuple(map(int, seen)), memory.iterations + 1)
        return _anew(self._changed(np.array(memory.noise), total / np.maximum(seen, 1)))

    def _changed(self, noise: np.ndarray, spread: np.ndarray) -> np.ndarray:
        if not spread.max() > 0:
            return noise
        base = np.array([branch.noise for branch in self.branches])
        ends = np.array([self.times[branch.stop] for branch in self.branches])
        logs = np.log(np.maximum(spread, LEAST * spread.max()))
        bounded = lambda noise: np.clip(noise, base / REACH, np.minimum(base * REACH, ends))
        noise = bounded(noise * np.exp((logs.mean() - logs) / 2))
        return bounded(noise * math.exp(np.log(base / noise).mean()))


def _anew(noise: np.ndarray) -> Memory:
    return Memory(_floats(noise), (0.0,) * len(noise), (0,) * len(noise), 0)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values))
