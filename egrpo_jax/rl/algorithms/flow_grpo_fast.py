"""Flow-GRPO-Fast, of the code of Flow-GRPO (arXiv:2505.05470): a short window of random steps, at random."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import numpy as np

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Count, Range
from egrpo_jax.flow.process import NoiseLevel
from egrpo_jax.flow.solver import Euler
from egrpo_jax.rl.algorithms.base import GROUP_SIZE, StepAlgorithm
from egrpo_jax.rl.tree import TreePlan


@dataclasses.dataclass(frozen=True)
class FlowGrpoFast(StepAlgorithm):
    """Flow-GRPO-Fast (code of arXiv:2505.05470): random steps in a window alone, whose place is drawn each iteration.

    The defaults are its code's for FLUX.

    Attributes:
      window: the number of random steps.
      window_end: the grid step before which the window ends, at the latest; None for half of the grid.
      same_noise: all samples of a prompt share their initial noise, hence all steps before the window, which are
        computed once (the first version of that code).
    """

    algorithm: str = "flow_grpo_fast"
    num_steps: Annotated[int, Range(2, 10_000)] = 6
    process: str = "cps"
    noise_level: NoiseLevel = 0.8
    group_size: Annotated[int, GROUP_SIZE] = 24
    window: Count = 3
    window_end: Count | None = None
    same_noise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self._end >= self.num_steps:
            expected = f"at most {self.num_steps - 1}: the last step is deterministic"
            raise ConfigError("window_end", self.window_end, expected)
        if self.window > self._end:
            limit = "window_end" if self.window_end else "half of num_steps"
            raise ConfigError("window", self.window, f"at most {self._end}, {limit}")

    @property
    def _end(self) -> int:
        return self.window_end or self.num_steps // 2

    def make_plan(self, iteration: int = 0, seed: int = 0) -> TreePlan:
        """The plan of an iteration, its window at a place of its own."""
        start = int(np.random.default_rng((seed, iteration)).integers(self._end - self.window + 1))
        process = self.make_process()
        branches = self.random_steps(process, start, self.window)
        roots = 1 if self.same_noise else self.group_size
        return TreePlan(
            self.times, process, branches, self.group_size, (Euler(),),
            roots=roots, children=(self.group_size // roots, *(1,) * (self.window - 1)),
        )  # fmt: skip
