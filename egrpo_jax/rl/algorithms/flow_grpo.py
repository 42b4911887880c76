"""Flow-GRPO (arXiv:2505.05470): every step is random."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from egrpo_jax.common.ranges import Range
from egrpo_jax.flow.process import NoiseLevel
from egrpo_jax.flow.solver import Euler
from egrpo_jax.rl.algorithms.base import GROUP_SIZE, StepAlgorithm
from egrpo_jax.rl.tree import TreePlan


@dataclasses.dataclass(frozen=True)
class FlowGrpo(StepAlgorithm):
    """Flow-GRPO (arXiv:2505.05470): samples from initial noises of their own, all steps but the last one random.

    The defaults are its code's for FLUX.
    """

    algorithm: str = "flow_grpo"
    num_steps: Annotated[int, Range(2, 10_000)] = 6
    noise_level: NoiseLevel = 0.9
    group_size: Annotated[int, GROUP_SIZE] = 24

    def make_plan(self, iteration: int = 0, seed: int = 0) -> TreePlan:
        """The same plan for all iterations."""
        del iteration, seed
        process = self.make_process()
        branches = self.random_steps(process, 0, self.num_steps - 1)
        return TreePlan(
            self.times, process, branches, self.group_size, (Euler(),),
            roots=self.group_size, children=(1,) * len(branches),
        )  # fmt: skip
