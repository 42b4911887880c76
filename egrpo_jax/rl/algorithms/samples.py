"""The base of the algorithms without random steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, TypeAlias

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Count, Range
from egrpo_jax.flow.process import Ode
from egrpo_jax.flow.solver import SOLVERS
from egrpo_jax.rl.algorithms.base import Algorithm
from egrpo_jax.rl.forward_plan import DrawTimes, ForwardObjective, ForwardPlan
from egrpo_jax.rl.learner import LearnerConfig

SampleSolver: TypeAlias = Literal["euler", "dpm2m"]


@dataclasses.dataclass(frozen=True)
class SampleAlgorithm(Algorithm):
    """An algorithm that learns from samples of the ODE, whatever the way to them.

    Attributes:
      solver: that walks to them, "euler" or "dpm2m", DPM-Solver++(2M).
      pairs: times, each with a noise, at which each sample trains.
      noisiest: the share of the grid's times that these are of, from pure noise on.
    """

    solver: SampleSolver = "euler"
    pairs: Count = 4
    noisiest: Annotated[float, Range(0.01, 1)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs > self._candidates:
            expected = f"at most {self._candidates}, the times that there are to learn at"
            raise ConfigError("pairs", self.pairs, expected)

    @property
    def _candidates(self) -> int:
        return int(self.num_steps * self.noisiest + 1e-6)  # 0.7 * 10 is 7

    def forward_plan(
        self, draw: DrawTimes, make_objective: Callable[[LearnerConfig], ForwardObjective], shares_pairs: bool = False
    ) -> ForwardPlan:
        """The plan of such samples."""
        solver = SOLVERS[self.solver](self.num_steps)
        return ForwardPlan(
            self.times, Ode(), (), self.group_size, (solver,), roots=self.group_size,
            pairs=self.pairs, draw=draw, learns_at=self.times[: self._candidates + 1],
            shares_pairs=shares_pairs, make_objective=make_objective,
        )  # fmt: skip
