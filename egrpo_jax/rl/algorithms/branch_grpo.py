"""BranchGRPO (arXiv:2509.06040): a tree of random steps, compared depth by depth."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated, Literal

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Count, CountOrZero, Range
from egrpo_jax.flow.process import NoiseLevel
from egrpo_jax.flow.solver import Euler
from egrpo_jax.rl.algorithms.base import GROUP_SIZE, StepAlgorithm
from egrpo_jax.rl.plan import Branch
from egrpo_jax.rl.tree import TreePlan


@dataclasses.dataclass(frozen=True)
class BranchGrpo(StepAlgorithm):
    """BranchGRPO (arXiv:2509.06040): a tree whose steps are all random, from its first split on.

    The reward of an inner node is the mean of its leaves', and is compared with those of the same depth. The published
    code draws the noise of a split four times too large for its own density; here it is that of the density.

    Attributes:
      splits: grid steps at which each state has several children.
      split_into: how many.
      pruned: steps after the last split that do not train, which move towards it (depth pruning); 0 trains all.
      leaves: whose steps after the last split train (width pruning): "all"; "best_half" of those that it parts; or the
        best and the worst quarter of all, "extremes".
      prune_every: iterations between two of their moves, by a step, from the last step of the tree on.
    """

    algorithm: str = "branch_grpo"
    num_steps: Annotated[int, Range(2, 10_000)] = 20
    process: str = "dance_sde"
    noise_level: NoiseLevel = 0.3
    group_size: Annotated[int, GROUP_SIZE] = 16
    splits: tuple[CountOrZero, ...] = (0, 3, 6, 9)
    split_into: Annotated[int, Range(2, 10_000)] = 2
    pruned: CountOrZero = 0
    leaves: Literal["all", "best_half", "extremes"] = "all"
    prune_every: Count = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.splits or any(b <= a for a, b in itertools.pairwise(self.splits)):
            raise ConfigError("splits", self.splits, "one or more increasing grid steps")
        if self.splits[-1] >= self.num_steps - 1:
            raise ConfigError("splits", self.splits[-1], f"grid steps from 0 to {self.num_steps - 2}")
        leaves = self.split_into ** len(self.splits)
        if self.group_size != leaves:
            expected = f"{leaves}, the leaves of a tree that splits {len(self.splits)} times into {self.split_into}"
            raise ConfigError("group_size", self.group_size, expected)
        if self.pruned > (most := max(0, self.num_steps - 3 - self.splits[-1])):
            raise ConfigError("pruned", self.pruned, f"at most {most}: of the steps after the last split some train")

        self._check_leaves()

    def _check_leaves(self) -> None:
        parts = {"all": 1, "best_half": 2, "extremes": 4}[self.leaves]
        number = self.split_into if self.leaves == "best_half" else self.group_size
        if number % parts:
            raise ConfigError("leaves", self.leaves, f"'all': {number} samples are no multiple of {parts}")

    def make_plan(self, iteration: int = 0, seed: int = 0) -> TreePlan:
        """The plan of an iteration: the same tree, its pruned steps where they are then."""
        del seed
        process = self.make_process()
        first, last = self.splits[0], self.num_steps - 1
        branches = self.random_steps(process, first, last - first)
        branches += self._last_step(branches)
        chain = first + len(branches) - self.splits[-1] - 1
        begin = max(0, chain - self.pruned - iteration // self.prune_every)
        kept = tuple(step for step in range(chain) if not begin <= step < begin + self.pruned)
        return TreePlan(
            self.times, process, branches, self.group_size, (Euler(),),
            children=tuple(self.split_into if first + k in self.splits else 1 for k in range(len(branches))),
            kept=len(kept) if self.pruned else None,
            kept_steps=kept if self.pruned else None,
            leaves=self.leaves,
            by_depth=True,
        )  # fmt: skip

    def _last_step(self, branches: tuple[Branch, ...]) -> tuple[Branch, ...]:
        """The step to t' = 0, where the process has noise there."""
        last = self.make_branch(self.make_process(), branches[-1].stop)
        return (last,) if last.exp_entropy > 0 else ()
