"""TempFlow-GRPO (arXiv:2508.04324): several anchors of a prompt, and small groups at each of their steps."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from egrpo_jax.common.ranges import Range
from egrpo_jax.flow.solver import Euler
from egrpo_jax.rl.algorithms.base import GROUP_SIZE, StepAlgorithm
from egrpo_jax.rl.plan import AnchorPlan


@dataclasses.dataclass(frozen=True)
class TempFlowGrpo(StepAlgorithm):
    """TempFlow-GRPO (arXiv:2508.04324): seeds of a prompt with an anchor each, and a group at every step but the last.

    Its weights of steps are `learner.step_weights` "noise".

    Attributes:
      seeds: anchors of each prompt, each from an initial noise of its own.
      compared_with: samples of the same step and "seed" are a group (the published code), or of the same step of the
        "prompt", whichever seed they are of.
    """

    algorithm: str = "tempflow_grpo"
    num_steps: Annotated[int, Range(2, 10_000)] = 10
    group_size: Annotated[int, GROUP_SIZE] = 6
    seeds: Annotated[int, Range(1, 10_000)] = 4
    compared_with: Literal["seed", "prompt"] = "seed"

    def make_plan(self, iteration: int = 0, seed: int = 0) -> AnchorPlan:
        """The same plan for all iterations."""
        del iteration, seed
        process = self.make_process()
        return AnchorPlan(
            times=self.times,
            process=process,
            branches=self.random_steps(process, 0, self.num_steps - 1),
            group_size=self.group_size,
            tail_solvers=(Euler(),),
            seeds=self.seeds,
            merges_seeds=self.compared_with == "prompt",
        )
