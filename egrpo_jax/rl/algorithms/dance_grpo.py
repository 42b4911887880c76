"""DanceGRPO (arXiv:2505.07818): random steps from one initial noise, of which each sample trains some."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from egrpo_jax.common.ranges import Range
from egrpo_jax.flow.process import NoiseLevel
from egrpo_jax.flow.solver import Euler
from egrpo_jax.rl.algorithms.base import StepAlgorithm
from egrpo_jax.rl.tree import TreePlan


@dataclasses.dataclass(frozen=True)
class DanceGrpo(StepAlgorithm):
    """DanceGRPO (arXiv:2505.07818): samples that share their initial noise, all steps but the last one random.

    The last step is deterministic: the published code takes the data predicted there as its image.

    Attributes:
      trained_share: of the random steps that each sample trains. The first one, whose forward and backward pass all
        samples share, is among those of each; the others every sample draws for itself.
    """

    algorithm: str = "dance_grpo"
    num_steps: Annotated[int, Range(3, 10_000)] = 16
    process: str = "dance_sde"
    noise_level: NoiseLevel = 0.3
    trained_share: Annotated[float, Range(0.01, 1)] = 0.6

    def make_plan(self, iteration: int = 0, seed: int = 0) -> TreePlan:
        """The same plan for all iterations."""
        del iteration, seed
        process = self.make_process()
        branches = self.random_steps(process, 0, self.num_steps - 1)
        chain = len(branches) - 1
        return TreePlan(
            self.times, process, branches, self.group_size, (Euler(),),
            children=(self.group_size, *(1,) * chain),
            kept=min(chain, max(1, int(self.trained_share * len(branches)) - 1)),
        )  # fmt: skip
