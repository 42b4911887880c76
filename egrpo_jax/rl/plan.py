"""The plan of one training iteration: which steps are random, where samples branch, and what it all costs.

E-GRPO (arXiv:2601.00423, Algorithm 1): one deterministic *anchor* trajectory for each prompt; at each *active* step a
group of `group_size` samples *branches* off the anchor by one random step, which spans several grid steps where the
entropy of one is too low; deterministic *tails* carry the samples to images.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Range, Shift, check
from egrpo_jax.flow.entropy import Merge, exp_entropy, merges_by_entropy
from egrpo_jax.flow.grid import Times, shifted_times
from egrpo_jax.flow.process import FlowSde
from egrpo_jax.flow.solver import Euler, tail_steps


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The config section `plan`; the defaults are the paper's setting.

    Attributes:
      num_steps: T, steps of the time grid.
      shift: s of the shifted grid t = s u / (1 + (s - 1) u).
      noise_level: a, scale of the noise of a random step: σ = a √(t / (1 - t)).
      active_steps: grid steps that get a group of samples, counted from 0 at pure noise (the paper's k is
        T - step); None for the first half.
      entropy_threshold: tau; an active step spans as few grid steps as bring e^{h/d} to tau. 0 never merges.
      merges: instead of `entropy_threshold`, which is None then, the number of grid steps each active step spans.
      group_size: G, samples for each prompt and active step.
      tail_strides: the grid strides at which tails are walked; each stride gives every sample one more image and one
        more advantage, and these are added (the granularities of G2RPO).
    """

    num_steps: Annotated[int, Range(2, 10_000)] = 16
    shift: Shift = 3.0
    noise_level: Annotated[float, Range(1e-4, 100)] = 0.7
    active_steps: tuple[Annotated[int, Range(0, 9_999)], ...] | None = None
    entropy_threshold: Annotated[float, Range(0, 1000)] | None = 2.2
    merges: tuple[Annotated[int, Range(1, 10_000)], ...] | None = None
    group_size: Annotated[int, Range(2, 100_000, why="one sample has nothing to be compared with")] = 12
    tail_strides: tuple[Annotated[int, Range(1, 10_000)], ...] = (1,)

    def __post_init__(self) -> None:
        check(self)
        if not self.tail_strides:
            raise ConfigError("tail_strides", self.tail_strides, "one or more strides")
        self._check_active_steps()
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

    def _check_merges(self) -> None:
        if (self.merges is None) == (self.entropy_threshold is None):
            raise ConfigError("merges", self.merges, "either merges or entropy_threshold, the other one None")
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


@dataclasses.dataclass(frozen=True)
class Branch:
    """A random step from grid step `step` to `stop`, with its diffusion coefficient and e^{h/d} (merged, unmerged)."""

    step: int
    stop: int
    sigma: float
    exp_entropy: float
    unmerged_exp_entropy: float
    clamped: bool

    @property
    def merge(self) -> int:
        """The number of grid steps that it spans."""
        return self.stop - self.step


@dataclasses.dataclass(frozen=True)
class Plan:
    """A static description of one iteration; see the module's docstring.

    Attributes:
      times: the grid, T + 1 times from 1 to 0.
      branches: one for each active step.
      group_size: samples of each branch.
      tail_strides: see `PlanConfig`.
    """

    times: Times
    branches: tuple[Branch, ...]
    group_size: int
    tail_strides: tuple[int, ...]

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.times) - 1

    @property
    def rollout_passes(self) -> int:
        """Model forward passes of one prompt's rollout: the anchor's and the tails'; branching needs none."""
        tails = itertools.product(self.branches, map(Euler, self.tail_strides))
        steps = sum(tail_steps(solver, self.times, branch.stop) for branch, solver in tails)
        return self.num_steps + self.group_size * steps

    @property
    def training_passes(self) -> int:
        """Forward-and-backward passes of one prompt's update: a group shares its latents, hence one for each branch."""
        return len(self.branches)

    def update_equivalents(self, num_updates: int) -> int:
        """The work of one prompt's update in forward passes: a backward pass is two, what remat repeats does not count.

        Before the first of several updates, one more pass of each state takes the old log-probabilities.
        """
        return (3 + (num_updates > 1)) * self.training_passes

    @property
    def decodes(self) -> int:
        """Images decoded and scored for one prompt."""
        return len(self.branches) * len(self.tail_strides) * self.group_size


def make_plan(config: PlanConfig) -> Plan:
    """The E-GRPO plan of `config`."""
    times = shifted_times(config.num_steps, config.shift)
    steps, process = config.resolved_active_steps, FlowSde(config.noise_level)
    if config.merges is not None:
        merges = tuple(Merge(length) for length in config.merges)
    else:
        assert config.entropy_threshold is not None  # PlanConfig demands one of the two
        merges = merges_by_entropy(process, times, steps, config.entropy_threshold)
    branches = tuple(
        Branch(
            step=step,
            stop=step + merge.length,
            sigma=process.noise(times, step, merge.length),
            exp_entropy=exp_entropy(process, times, step, merge.length),
            unmerged_exp_entropy=exp_entropy(process, times, step, 1),
            clamped=merge.clamped,
        )
        for step, merge in zip(steps, merges, strict=True)
    )
    return Plan(times, branches, config.group_size, config.tail_strides)


def describe(plan: Plan) -> str:
    """A table of the plan's random steps and a line of its cost, for people."""
    lines = [" step   time  ->  time  merge  e^(h/d)  unmerged"]
    for branch in plan.branches:
        lines.append(
            f"{branch.step:5d}  {plan.times[branch.step]:.4f} -> {plan.times[branch.stop]:.4f}  {branch.merge:5d}  "
            f"{branch.exp_entropy:7.3f}  {branch.unmerged_exp_entropy:8.3f}"
            + ("  clamped: the grid ends before the threshold" if branch.clamped else "")
        )
    lines.append(
        f"for each prompt: {plan.rollout_passes} forward passes and {plan.decodes} images in the rollout, "
        f"{plan.training_passes} forward and backward passes in the update"
    )
    return "\n".join(lines)
