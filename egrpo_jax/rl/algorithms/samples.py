"""What the algorithms without random steps share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, TypeAlias

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Count
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
    """

    solver: SampleSolver = "euler"
    pairs: Count = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairs > self.candidates:
            expected = f"at most {self.candidates}, the times that there are to learn at"
            raise ConfigError("pairs", self.pairs, expected)

    @property
    def candidates(self) -> int:
        """Times of the grid that a sample may train at."""
        return self.num_steps

    def forward_plan(
        self, draw: DrawTimes, make_objective: Callable[[LearnerConfig], ForwardObjective], shares_pairs: bool = False
    ) -> ForwardPlan:
        """The plan of such samples."""
        solver = SOLVERS[self.solver](self.num_steps)
        return ForwardPlan(
            self.times, Ode(), (), self.group_size, (solver,), roots=self.group_size,
            pairs=self.pairs, draw=draw, shares_pairs=shares_pairs, make_objective=make_objective,
        )  # fmt: skip
