"""G2RPO (arXiv:2510.01982): a group at each of the first steps, its samples judged at several granularities."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Count, Range
from egrpo_jax.flow.solver import Euler
from egrpo_jax.rl.algorithms.base import StepAlgorithm
from egrpo_jax.rl.plan import AnchorPlan


@dataclasses.dataclass(frozen=True)
class G2rpo(StepAlgorithm):
    """G2RPO (arXiv:2510.01982): groups that branch off an anchor by single steps, judged by tails of several strides.

    Attributes:
      active: how many steps get a group of samples, the first ones.
      granularities: the grid strides at which tails are walked; the advantages of a sample's images are added.
    """

    algorithm: str = "g2rpo"
    active: Count = 8
    granularities: tuple[Annotated[int, Range(1, 10_000)], ...] = (1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.active > self.num_steps:
            raise ConfigError("active", self.active, f"at most the {self.num_steps} steps of the grid")
        if not self.granularities:
            raise ConfigError("granularities", self.granularities, "one or more strides")

    def make_plan(self, iteration: int = 0, seed: int = 0) -> AnchorPlan:
        """The same plan for all iterations."""
        del iteration, seed
        process = self.make_process()
        branches = self.random_steps(process, 0, self.active)
        return AnchorPlan(self.times, process, branches, self.group_size, tuple(map(Euler, self.granularities)))
