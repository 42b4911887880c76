"""MixGRPO and MixGRPO-Flash (arXiv:2507.21802): a window of random steps that moves from noise to image."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import numpy as np

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Count, CountOrZero, Range
from egrpo_jax.flow.solver import DpmSolver2M, Euler, Solver
from egrpo_jax.rl.algorithms.base import StepAlgorithm
from egrpo_jax.rl.tree import TreePlan


@dataclasses.dataclass(frozen=True)
class MixGrpo(StepAlgorithm):
    """MixGRPO (arXiv:2507.21802): one initial noise, random steps in a window alone, deterministic ones around it.

    Attributes:
      window: the number of random steps.
      moves: "progressive": from `first` on, a step further every `move_every` iterations, until it ends with the grid's
        last but one; "random": drawn each iteration; "frozen": it stays at `first`.
      first: the grid step where the window begins.
      move_every: iterations between two of its moves.
      tail_share: the tail's steps of DPM-Solver++(2M), as a share of the grid's that are left (MixGRPO-Flash: 0.4; its
        frozen variant: 0.2); None for Euler steps on the grid.
    """

    algorithm: str = "mix_grpo"
    num_steps: Annotated[int, Range(2, 10_000)] = 25
    window: Count = 4
    moves: Literal["progressive", "random", "frozen"] = "progressive"
    first: CountOrZero = 0
    move_every: Count = 25
    tail_share: Annotated[float, Range(0.01, 1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window >= self.num_steps:
            raise ConfigError("window", self.window, f"at most {self.num_steps - 1}: the last step is deterministic")
        if self.first > self._latest:
            expected = f"at most {self._latest}: a window of {self.window} ends before the grid's last step"
            raise ConfigError("first", self.first, expected)

    @property
    def _latest(self) -> int:
        return self.num_steps - 1 - self.window

    def make_plan(self, iteration: int = 0, seed: int = 0) -> TreePlan:
        """The plan of an iteration, its window where it is then."""
        process, start = self.make_process(), self._start(iteration, seed)
        branches = self.random_steps(process, start, self.window)
        return TreePlan(
            self.times, process, branches, self.group_size, (self._solver(start),),
            children=(self.group_size, *(1,) * (self.window - 1)),
        )  # fmt: skip

    def _start(self, iteration: int, seed: int) -> int:
        if self.moves == "random":
            return int(np.random.default_rng((seed, iteration)).integers(self._latest + 1))
        moved = iteration // self.move_every if self.moves == "progressive" else 0
        return min(self.first + moved, self._latest)

    def _solver(self, start: int) -> Solver:
        if self.tail_share is None:
            return Euler()
        return DpmSolver2M(max(1, int((self.num_steps - start - self.window) * self.tail_share)))
