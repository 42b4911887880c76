"""E-GRPO (arXiv:2601.00423): each sample takes one random step, merged from several where their entropy is too low."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Literal

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Count, Range
from egrpo_jax.flow.entropy import Merge, merges_by_entropy, noise_by_entropy
from egrpo_jax.flow.process import ExactByStd, FlowByStd, Process, Stds
from egrpo_jax.flow.solver import DpmSolver2M, Euler, Solver
from egrpo_jax.rl.adaptive import AdaptivePlan
from egrpo_jax.rl.algorithms.base import StepAlgorithm
from egrpo_jax.rl.plan import AnchorPlan

LEAST_BY_NOISE = 0.001
BY_STD: Mapping[str, Callable[[Stds], Process]] = MappingProxyType({"exact_sde": ExactByStd, "flow_sde": FlowByStd})
"""The kernels that take any standard deviation."""


@dataclasses.dataclass(frozen=True)
class EGrpo(StepAlgorithm):
    """E-GRPO (arXiv:2601.00423): one random step a sample, merged until its entropy is high enough.

    Attributes:
      active_steps: grid steps that get a group of samples, counted from 0 at pure noise (the paper's k is
        T - step); None for the first half.
      entropy_threshold: tau; an active step spans as few grid steps as bring e^{h/d} to tau. 0 never merges.
      entropy_by: how it comes to tau: by "merge", or by "noise" alone, which "flow_sde" and "exact_sde" can choose:
        every active step is a single one, of standard deviation tau / √(2 π e).
      merges: instead of `entropy_threshold`, which is None then, the number of grid steps each active step spans.
      stds: instead of both and of `noise_level`, with the same kernels: the standard deviation of every active step,
        or of each of them, which are single steps.
      adapt_every: iterations between changes of each step's noise to what it does to rewards (`rl.adaptive`), for
        "exact_sde" with stds or entropy_by "noise"; None keeps it. Not of the paper.
      tail_strides: the grid strides at which tails are walked; each stride gives every sample one more image and one
        more advantage, and these are added (the granularities of G2RPO).
      tail_steps: more of these, tails of so many steps of DPM-Solver++(2M), spread over what is left of the grid.
    """

    algorithm: str = "egrpo"
    active_steps: tuple[Annotated[int, Range(0, 9_999)], ...] | None = None
    entropy_threshold: Annotated[float, Range(0, 1000)] | None = 2.2
    entropy_by: Literal["merge", "noise"] = "merge"
    merges: tuple[Annotated[int, Range(1, 10_000)], ...] | None = None
    stds: tuple[Annotated[float, Range(1e-4, 1000)], ...] | None = None
    adapt_every: Count | None = None
    tail_strides: tuple[Annotated[int, Range(1, 10_000)], ...] = (1,)
    tail_steps: tuple[Annotated[int, Range(1, 10_000)], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tail_strides + self.tail_steps:
            raise ConfigError("tail_strides", self.tail_strides, "one or more strides, or tail_steps")
        chosen = self.stds is not None or self.entropy_by == "noise"
        if chosen and self.process not in BY_STD:
            expected = f"one of {', '.join(sorted(BY_STD))}, which take any standard deviation"
            raise ConfigError("process", self.process, expected)
        if self.adapt_every is not None and not (chosen and self.process == "exact_sde"):
            expected = "None, or 'exact_sde' with noise that can be chosen: stds, or entropy_by 'noise'"
            raise ConfigError("adapt_every", self.adapt_every, expected)
        self._check_active_steps()
        self._check_noise()
        self._check_merges()

    def _check_active_steps(self) -> None:
        steps = self.active_steps
        if steps is None:
            return
        for step in steps:
            if step >= self.num_steps:
                raise ConfigError("active_steps", step, f"a grid step from 0 to {self.num_steps - 1}")
        if not steps or any(b <= a for a, b in itertools.pairwise(steps)):
            raise ConfigError("active_steps", steps, "one or more increasing grid steps")

    def _check_noise(self) -> None:
        given = [name for name in ("entropy_threshold", "merges", "stds") if getattr(self, name) is not None]
        if len(given) != 1:
            expected = "one of entropy_threshold, merges and stds, the others None"
            raise ConfigError(given[-1] if given else "merges", getattr(self, given[-1]) if given else None, expected)
        if self.entropy_by == "noise" and not (self.entropy_threshold or 0) >= LEAST_BY_NOISE:
            expected = f"at least {LEAST_BY_NOISE}: with entropy_by 'noise' all noise comes from it"
            raise ConfigError("entropy_threshold", self.entropy_threshold, expected)
        count = len(self.resolved_active_steps)
        if self.stds is not None and len(self.stds) not in (1, count):
            raise ConfigError("stds", self.stds, f"one for all, or one for each of the {count} active steps")

    def _check_merges(self) -> None:
        if self.merges is None:
            return
        steps = self.resolved_active_steps
        if len(self.merges) != len(steps):
            raise ConfigError("merges", self.merges, f"one entry for each of the {len(steps)} active steps")
        for step, length in zip(steps, self.merges, strict=True):
            if length > self.num_steps - step:
                raise ConfigError("merges", length, f"1 to {self.num_steps - step} at step {step}: the grid ends there")

    @property
    def resolved_active_steps(self) -> tuple[int, ...]:
        """`active_steps`, or the first half of the grid."""
        return tuple(range(self.num_steps // 2)) if self.active_steps is None else self.active_steps

    def make_plan(self, iteration: int = 0, seed: int = 0) -> AnchorPlan:
        """The same plan for all iterations, from which one whose noise adapts departs."""
        del iteration, seed
        process = self.make_process()
        branches = tuple(
            self.make_branch(process, step, merge.length, merge.clamped)
            for step, merge in zip(self.resolved_active_steps, self._merges(process), strict=True)
        )
        for branch in branches:
            if not branch.exp_entropy > 0:
                expected = f"steps with noise; {process} has none up to the end"
                raise ConfigError("plan.active_steps", branch.step, expected)
        solvers: tuple[Solver, ...] = (*map(Euler, self.tail_strides), *map(DpmSolver2M, self.tail_steps))
        plan = self.times, process, branches, self.group_size, solvers
        return AnchorPlan(*plan) if self.adapt_every is None else AdaptivePlan(*plan, every=self.adapt_every)

    def make_process(self) -> Process:
        """The process, whose noise may come from the entropy, or from a choice for each step."""
        if self.entropy_by == "noise":
            assert self.entropy_threshold is not None  # __post_init__ demands it
            return noise_by_entropy(self.entropy_threshold, BY_STD[self.process])
        if self.stds is not None:
            steps = self.resolved_active_steps
            of_step = dict(zip(steps, self.stds * (len(steps) // len(self.stds)), strict=True))
            return BY_STD[self.process](tuple(of_step.get(step, 1e-4) for step in range(self.num_steps)))
        return super().make_process()

    def _merges(self, process: Process) -> tuple[Merge, ...]:
        steps = self.resolved_active_steps
        if self.merges is not None:
            return tuple(map(Merge, self.merges))
        if self.entropy_threshold is None or self.entropy_by == "noise":
            return (Merge(1),) * len(steps)
        return merges_by_entropy(process, self.times, steps, self.entropy_threshold)
