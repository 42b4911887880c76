"""The plan of one training iteration: which steps are random, where samples branch, and what it all costs.

E-GRPO (arXiv:2601.00423, Algorithm 1): one deterministic *anchor* trajectory for each prompt; at each *active* step a
group of `group_size` samples *branches* off the anchor by one random step, which spans several grid steps where the
entropy of one is too low; deterministic *tails* carry the samples to images.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Literal, TypeAlias

import numpy as np

from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.common.plugins import load_attribute
from egrpo_jax.common.ranges import Range, Shift, check
from egrpo_jax.flow.entropy import Merge, exp_entropy, merges_by_entropy, noise_by_entropy
from egrpo_jax.flow.grid import Times, shifted_times
from egrpo_jax.flow.process import Cps, DanceSde, ExactSde, FlowSde, NoiseByStd, NoiseLevel, Process
from egrpo_jax.flow.solver import DpmSolver2M, Euler, Solver, tail_steps

PROCESSES: Mapping[str, Callable[[float], Process]] = MappingProxyType(
    {"flow_sde": FlowSde, "dance_sde": DanceSde, "cps": Cps, "exact_sde": ExactSde}
)
"""The kernels of random steps, by their names in the config; each is made with a noise level."""
StepWeights: TypeAlias = Literal["none", "noise", "flat"]
LEAST_BY_NOISE = 0.001


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """The config section `plan`; the defaults are the paper's setting.

    Attributes:
      num_steps: T, steps of the time grid.
      shift: s of the shifted grid t = s u / (1 + (s - 1) u).
      process: the kernel of random steps: "flow_sde" (E-GRPO's and Flow-GRPO's), "dance_sde", "cps", "exact_sde", or
        "module:attribute" of your own, a class that makes a `flow.Process` of a noise level.
      noise_level: of the process: a of "flow_sde", σ = a √(t / (1 - t)), or η of the others.
      active_steps: grid steps that get a group of samples, counted from 0 at pure noise (the paper's k is
        T - step); None for the first half.
      entropy_threshold: tau; an active step spans as few grid steps as bring e^{h/d} to tau. 0 never merges.
      entropy_by: how it comes to tau: by "merge", or by "noise" alone, which only "exact_sde" can choose: every active
        step is a single one, of standard deviation tau / √(2 π e).
      merges: instead of `entropy_threshold`, which is None then, the number of grid steps each active step spans.
      stds: instead of both and of `noise_level`, with "exact_sde": the standard deviation of every active step, or of
        each of them, which are single steps.
      group_size: G, samples for each prompt and active step.
      tail_strides: the grid strides at which tails are walked; each stride gives every sample one more image and one
        more advantage, and these are added (the granularities of G2RPO).
      tail_steps: more of these, tails of so many steps of DPM-Solver++(2M), spread over what is left of the grid.
    """

    num_steps: Annotated[int, Range(2, 10_000)] = 16
    shift: Shift = 3.0
    process: str = "flow_sde"
    noise_level: NoiseLevel = 0.7
    active_steps: tuple[Annotated[int, Range(0, 9_999)], ...] | None = None
    entropy_threshold: Annotated[float, Range(0, 1000)] | None = 2.2
    entropy_by: Literal["merge", "noise"] = "merge"
    merges: tuple[Annotated[int, Range(1, 10_000)], ...] | None = None
    stds: tuple[Annotated[float, Range(1e-4, 1000)], ...] | None = None
    group_size: Annotated[int, Range(2, 100_000, why="one sample has nothing to be compared with")] = 12
    tail_strides: tuple[Annotated[int, Range(1, 10_000)], ...] = (1,)
    tail_steps: tuple[Annotated[int, Range(1, 10_000)], ...] = ()

    def __post_init__(self) -> None:
        check(self)
        if not self.tail_strides + self.tail_steps:
            raise ConfigError("tail_strides", self.tail_strides, "one or more strides, or tail_steps")
        self._check_process()
        self._check_active_steps()
        self._check_noise()
        self._check_merges()

    def _check_process(self) -> None:
        if self.process in PROCESSES:
            PROCESSES[self.process](self.noise_level)
        elif ":" not in self.process:
            raise ConfigError(
                "process", self.process, f"one of {', '.join(PROCESSES)}, or module:attribute of your own"
            )
        if self.process != "exact_sde" and (self.stds is not None or self.entropy_by == "noise"):
            raise ConfigError("process", self.process, "'exact_sde', which alone takes any standard deviation")

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


@dataclasses.dataclass(frozen=True)
class Branch:
    """A random step from grid step `step` to `stop`, with the noise of its process and e^{h/d} (merged, unmerged)."""

    step: int
    stop: int
    noise: float
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
      process: the kernel of random steps.
      branches: one for each active step.
      group_size: samples of each branch.
      tail_solvers: each walks a tail of every sample.
    """

    times: Times
    process: Process
    branches: tuple[Branch, ...]
    group_size: int
    tail_solvers: tuple[Solver, ...]

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.times) - 1

    @property
    def rollout_passes(self) -> int:
        """Model forward passes of one prompt's rollout: the anchor's and the tails'; branching needs none."""
        tails = itertools.product(self.branches, self.tail_solvers)
        steps = sum(tail_steps(solver, self.times, branch.stop) for branch, solver in tails)
        return self.num_steps + self.group_size * steps

    @property
    def tail_stepper(self) -> Solver:
        """The solver that takes the steps of all tails, Euler's being those of any solver at weight 0."""
        return next((solver for solver in self.tail_solvers if not isinstance(solver, Euler)), self.tail_solvers[0])

    @property
    def training_passes(self) -> int:
        """Forward-and-backward passes of one prompt's update: a group shares its latents, hence one for each branch."""
        return len(self.branches)

    def update_equivalents(self, epochs: int, is_scored: bool) -> int:
        """The work of one prompt's update in forward passes: a backward pass is two, what remat repeats does not count.

        Before the first of several updates, one more pass of each state takes the old log-probabilities: `is_scored`.
        """
        return (3 * epochs + is_scored) * self.training_passes

    def step_weights(self, kind: StepWeights) -> np.ndarray:
        r"""The factor of the loss of each active step, `[E]`.

        A sample's log-density has the gradient kappa e dv, with kappa = J/std the step's |d mean / d v| over its std,
        e the sample's noise and dv the gradient of the velocity: the later the step, the more it weighs.

        "none": 1. "noise": std, of mean 1 over the steps, which leaves J (TempFlow-GRPO, arXiv:2508.04324, eq. 8).
        "flat": c/J, for a loss of log-ratios times std, c being such that std c/J, that is 1/kappa, has mean 1: which
        leaves 1 (GRPO-Guard, arXiv:2510.22319, for any kernel as in Precise, arXiv:2605.23522).
        """
        steps = [(self.times[branch.step], self.times[branch.stop], branch.noise) for branch in self.branches]
        std = np.array([self.process.std(*step) for step in steps])
        jacobian = np.array([self.process.jacobian(*step) for step in steps])
        if kind == "noise":
            return std / std.mean()
        return np.ones_like(std) if kind == "none" else 1 / (jacobian * (std / jacobian).mean())

    @property
    def decodes(self) -> int:
        """Images decoded and scored for one prompt."""
        return len(self.branches) * len(self.tail_solvers) * self.group_size


def make_plan(config: PlanConfig) -> Plan:
    """The E-GRPO plan of `config`.

    Raises:
      UserError: a process of the user's own cannot be made, or a random step would have no noise.
    """
    times = shifted_times(config.num_steps, config.shift)
    steps, process = config.resolved_active_steps, _process(config)
    branches = tuple(
        Branch(
            step=step,
            stop=step + merge.length,
            noise=process.noise(times, step, merge.length),
            exp_entropy=exp_entropy(process, times, step, merge.length),
            unmerged_exp_entropy=exp_entropy(process, times, step, 1),
            clamped=merge.clamped,
        )
        for step, merge in zip(steps, _merges(config, process, times), strict=True)
    )
    for branch in branches:
        if not branch.exp_entropy > 0:
            raise ConfigError("plan.active_steps", branch.step, f"steps with noise; {process} has none up to the end")
    solvers: list[Solver] = [*map(Euler, config.tail_strides), *map(DpmSolver2M, config.tail_steps)]
    return Plan(times, process, branches, config.group_size, tuple(solvers))


def _process(config: PlanConfig) -> Process:
    if config.entropy_by == "noise":
        assert config.entropy_threshold is not None  # PlanConfig demands it
        return noise_by_entropy(config.entropy_threshold)
    if config.stds is not None:
        steps = config.resolved_active_steps
        of_step = dict(zip(steps, config.stds * (len(steps) // len(config.stds)), strict=True))
        return NoiseByStd(tuple(of_step.get(step, 1e-4) for step in range(config.num_steps)))
    if config.process in PROCESSES:
        return PROCESSES[config.process](config.noise_level)
    return _own_process(config)


def _own_process(config: PlanConfig) -> Process:
    """The process that the user's class makes. Raises UserError, whatever that does wrong."""
    make: Callable[[float], Process] = load_attribute(config.process, "config.plan.process")
    try:
        process = make(config.noise_level)
    except Exception as error:
        raise UserError(
            f"config.plan.process: {config.process!r} makes no process of a noise level: {error}"
        ) from error
    missing = [name for name in ("noise", "std", "kernel", "jacobian") if not callable(getattr(process, name, None))]
    if missing:
        raise UserError(f"config.plan.process: what {config.process!r} makes lacks the methods {', '.join(missing)}")
    return process


def _merges(config: PlanConfig, process: Process, times: Times) -> tuple[Merge, ...]:
    steps = config.resolved_active_steps
    if config.merges is not None:
        return tuple(map(Merge, config.merges))
    if config.entropy_threshold is None or config.entropy_by == "noise":
        return (Merge(1),) * len(steps)
    return merges_by_entropy(process, times, steps, config.entropy_threshold)


def describe(plan: Plan) -> str:
    """A table of the plan's random steps and a line of its cost, for people."""
    lines = [" step   time  ->  time  merge  e^(h/d)  unmerged"]
    for branch in plan.branches:
        lines.append(
            f"{branch.step:5d}  {plan.times[branch.step]:.4f} -> {plan.times[branch.stop]:.4f}  {branch.merge:5d}  "
            f"{branch.exp_entropy:7.3f}  {branch.unmerged_exp_entropy:8.3f}"
            + ("  clamped: no merge comes to the threshold" if branch.clamped else "")
        )
    lines.append(
        f"for each prompt: {plan.rollout_passes} forward passes and {plan.decodes} images in the rollout, "
        f"{plan.training_passes} forward and backward passes in the update"
    )
    return "\n".join(lines)
