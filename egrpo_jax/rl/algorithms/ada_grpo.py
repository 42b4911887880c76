"""AdaGRPO (arXiv:2606.06828): of several prompts the one that is neither easy nor hard, by its anchor's reward."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Decay, Range
from egrpo_jax.flow.solver import Euler
from egrpo_jax.rl.algorithms.base import StepAlgorithm
from egrpo_jax.rl.plan import AnchorPlan


@dataclasses.dataclass(frozen=True)
class AdaGrpo(StepAlgorithm):
    """AdaGRPO (arXiv:2606.06828): groups off the anchor of one of several prompts, that whose reward is most usual.

    An advantage has a second part, of how a sample's reward compares with the running mean over iterations.

    Attributes:
      active_steps: grid steps that get a group of samples, counted from 0 at pure noise.
      candidates: prompts that are walked and scored, of which the one trains whose reward is nearest to the mean.
      memory: the share of the last value in the running mean and variance of rewards; the rest is the iteration's.
    """

    algorithm: str = "ada_grpo"
    active_steps: tuple[Annotated[int, Range(0, 9_999)], ...] = (0, 2, 4, 6)
    candidates: Annotated[int, Range(2, 10_000)] = 10
    memory: Decay = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        steps = self.active_steps
        if not steps or any(b <= a for a, b in itertools.pairwise(steps)) or steps[-1] >= self.num_steps:
            expected = f"one or more increasing grid steps from 0 to {self.num_steps - 1}"
            raise ConfigError("active_steps", steps, expected)

    def make_plan(self, iteration: int = 0, seed: int = 0) -> AnchorPlan:
        """The same plan for all iterations."""
        del iteration, seed
        process = self.make_process()
        branches = tuple(self.random_steps(process, step, 1)[0] for step in self.active_steps)
        return AnchorPlan(
            self.times, process, branches, self.group_size, (Euler(),),
            candidates=self.candidates, memory=self.memory,
        )  # fmt: skip
