"""The plan of one training iteration: which steps are random, where samples branch, and what it all costs.

Two shapes hold all algorithms. In an `AnchorPlan`, E-GRPO's (arXiv:2601.00423, Algorithm 1), one deterministic *anchor*
trajectory is walked for each prompt; at each *active* step a group of `group_size` samples *branches* off the anchor by
one random step, which spans several grid steps where the entropy of one is too low; deterministic *tails* carry the
samples to images. In a `TreePlan` (`rl.tree`) samples take several random steps, one after another.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.flow.grid import Times
from egrpo_jax.flow.process import Process
from egrpo_jax.flow.solver import Euler, Solver, VelocityFn, tail_steps
from egrpo_jax.rl.deal import deal_tails, first_rows
from egrpo_jax.rl.learner import LearnerConfig, StepWeights
from egrpo_jax.rl.objective import Objective, PolicyRatio
from egrpo_jax.rl.rollout import roll_out
from egrpo_jax.rl.transitions import Rollout, Transitions, step_noise

Normalise: TypeAlias = Callable[[Mapping[str, chex.Array], chex.Array], chex.Array]
"""Rewards `[P, E, R, G]` by name, and which samples have all of theirs, to advantages `[P, E, G]`: `advantage.credit`
with the options of a run."""


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


class Block(NamedTuple):
    """Sizes of transitions of one shape: of a prompt's rollout M states, and S samples from each."""

    states: int
    samples: int

    def divides(self, parts: int) -> bool:
        """True if so many minibatches share the samples of each state; else they share the states."""
        return parts > 1 and self.samples % parts == 0

    def passes(self, minibatches: int) -> int:
        """Forward and backward passes over it, by so many minibatches."""
        return self.states * (minibatches if self.divides(minibatches) else 1)


class Deal(Protocol):
    """A rollout's work, dealt to D workers; all of it arrays."""

    @property
    def sample(self) -> np.ndarray:
        """The place of each end of a tail in the scores `[P, E, R, G]`, flat; -1 for one that only fills up."""

    def worker_axes(self) -> Any:
        """For each array the axis of which a worker has its part."""


@dataclasses.dataclass(frozen=True)
class Plan(abc.ABC):
    """A static description of one iteration; see the module's docstring.

    Attributes:
      times: the grid, T + 1 times from 1 to 0.
      process: the kernel of random steps.
      branches: the K random steps of a prompt.
      group_size: G, samples that are compared with each other.
      tail_solvers: each walks a tail of every sample.
      seeds: rollouts of each prompt, each from an initial noise of its own.
      merges_seeds: samples are compared with those of all seeds of their prompt, not of their own alone.
      candidates: prompts of which one trains, chosen by the reward of its anchor, which all of them walk (AdaGRPO).
    """

    times: Times
    process: Process
    branches: tuple[Branch, ...]
    group_size: int
    tail_solvers: tuple[Solver, ...]
    seeds: int = 1
    merges_seeds: bool = False
    candidates: int = 1

    updates_by_step: ClassVar[bool]
    """True if the states of each random step can make an update of their own."""

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.times) - 1

    @property
    @abc.abstractmethod
    def groups(self) -> tuple[str, ...]:
        """Names of the E groups of samples of a rollout."""

    @property
    @abc.abstractmethod
    def blocks(self) -> tuple[Block, ...]:
        """Sizes of the transitions of a rollout that train."""

    @property
    def shares(self) -> tuple[float, ...]:
        """Of all samples that train, the shares of `blocks`."""
        counts = [block.states * block.samples for block in self.blocks]
        return tuple(count / sum(counts) for count in counts)

    @property
    @abc.abstractmethod
    def shared_passes(self) -> int:
        """Forward passes of a rollout before its samples go their own ways."""

    @property
    @abc.abstractmethod
    def own_passes(self) -> int:
        """Forward passes of a rollout after that: of random steps and tails."""

    @abc.abstractmethod
    def shares_code(self, other: Plan) -> bool:
        """Tells if code that is compiled for `other` serves this plan too, given its `schedule`."""

    @abc.abstractmethod
    def schedule(self) -> Any:
        """All numbers of an iteration, as arrays; plans of one shape and different schedules share compiled code."""

    @abc.abstractmethod
    def deal(self, num_rows: int, workers: int, slots: int | None) -> Deal:
        """The work of `num_rows` rollouts; `slots` samples are walked by a worker at once, where that can be chosen.

        Raises:
          ConfigError: it cannot be dealt to so many workers.
        """

    @abc.abstractmethod
    def roll_out(
        self,
        velocity_fn: VelocityFn,
        params: Any,
        deal: Any,
        schedule: Any,
        conditioning: Any,
        keys: chex.Array,
        shape: tuple[int, int],
    ) -> Rollout:
        """A worker's part of the rollouts.

        Args:
          velocity_fn, params: the model.
          deal: the worker's part of `deal`.
          schedule: of `schedule`.
          conditioning: pytree with leading axis P, the worker's own.
          keys: one for each of its rollouts, `[P]`.
          shape: (N, D) of the latents.

        Returns:
          Transitions of each of `blocks`, `[P, M, S]`, or those of some states; latents in the order of `deal`.
        """

    @abc.abstractmethod
    def gather(self, transitions: tuple[Transitions, ...], num_rows: int, workers: int) -> tuple[Transitions, ...]:
        """The transitions of all workers' rows as those of the rollouts `[P, M, S]`."""

    def prune(self, transitions: tuple[Any, ...], advantage: chex.Array) -> tuple[Any, ...]:
        """Those of `gather` that train, given their advantages `[P, K, G]`: as many as `blocks` say."""
        del advantage
        return transitions

    def objective(self, config: LearnerConfig) -> Objective:
        """The loss. Raises ConfigError if what the section asks for does not go with the algorithm."""
        self.step_weights(config.step_weights)  # all that can be wrong with them is told at the start
        return PolicyRatio(self.process, config)

    def credit(self, normalise: Normalise, values: Mapping[str, chex.Array], came: chex.Array) -> chex.Array:
        """The advantages `[P, K, G]`, at each random step, of the way to each sample.

        Args:
          normalise: turns rewards into advantages.
          values: of each reward `[P, E, R, G]`.
          came: whether a sample has all of its scores, like them.
        """
        merge, part = self._seeds_of(came.shape)
        return part(normalise({name: merge(value) for name, value in values.items()}, merge(came)))

    def _seeds_of(self, shape: tuple[int, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """From rollouts `[P seeds, E, R, G]` to prompts, and advantages `[P, E, G]` back to rollouts.

        All seeds of a prompt are its own; they are groups of their own, or parts of one.
        """
        rows, groups, tails, size = shape
        prompts, seeds = rows // self.seeds, self.seeds
        if self.seeds == 1:
            return lambda x: x, lambda x: x
        if not self.merges_seeds:
            return lambda x: x.reshape(prompts, -1, tails, size), lambda x: x.reshape(rows, groups, size)
        apart = (prompts, seeds, groups, tails, size)
        return (
            lambda x: x.reshape(apart).transpose(0, 2, 3, 1, 4).reshape(prompts, groups, tails, -1),
            lambda x: x.reshape(prompts, groups, seeds, size).swapaxes(1, 2).reshape(rows, groups, size),
        )

    @property
    def images(self) -> int:
        """Images decoded and scored for one prompt that trains."""
        return self.seeds * self.decodes + (self.candidates if self.candidates > 1 else 0)

    @property
    def rollout_passes(self) -> int:
        """Model forward passes of one prompt's rollouts."""
        return self.seeds * (self.shared_passes + self.own_passes)

    @property
    def training_passes(self) -> int:
        """Forward-and-backward passes of one prompt's joint update: samples of one state share it."""
        return self.training_passes_in(1)

    def training_passes_in(self, minibatches: int) -> int:
        """`training_passes` in so many minibatches."""
        return self.seeds * sum(block.passes(minibatches) for block in self.blocks)

    def update_equivalents(self, config: LearnerConfig) -> int:
        """The work of one prompt's update in forward passes: a backward pass is two, what remat repeats does not count.

        Before the updates more passes of each state may be made, see `LearnerConfig.scorings`.
        """
        passes = self.training_passes_in(config.minibatches)
        return (3 * config.epochs + config.scorings(len(self.branches))) * passes

    @property
    def decodes(self) -> int:
        """Images decoded and scored for one rollout."""
        return len(self.groups) * len(self.tail_solvers) * self.group_size

    @property
    def tail_stepper(self) -> Solver:
        """The solver that takes the steps of all tails, Euler's being those of any solver at weight 0."""
        return next((solver for solver in self.tail_solvers if not isinstance(solver, Euler)), self.tail_solvers[0])

    def step_weights(self, kind: StepWeights) -> np.ndarray:
        r"""The factor of the loss of each random step, `[K]`.

        A sample's log-density has the gradient kappa e dv, with kappa = J/std the step's |d mean / d v| over its std,
        e the sample's noise and dv the gradient of the velocity: the later the step, the more it weighs.

        "none": 1. "noise": std, of mean 1 over the steps, which leaves J (TempFlow-GRPO, arXiv:2508.04324, eq. 8).
        "flat": c/J, for a loss of log-ratios times std, c being such that std c/J, that is 1/kappa, has mean 1: which
        leaves 1 (GRPO-Guard, arXiv:2510.22319, for any kernel as in Precise, arXiv:2605.23522).

        Raises:
          ConfigError: "flat", and the mean of a step does not depend on the velocity.
        """
        steps = [(self.times[branch.step], self.times[branch.stop], branch.noise) for branch in self.branches]
        std = np.array([self.process.std(*step) for step in steps])
        jacobian = np.array([self.process.jacobian(*step) for step in steps])
        if kind == "flat" and not jacobian.all():
            unmoved = self.branches[int(np.argmin(np.abs(jacobian)))].step
            expected = f"'none' or 'noise': the mean of the random step {unmoved} does not depend on the velocity"
            raise ConfigError("learner.step_weights", kind, expected)
        if kind == "noise":
            return std / std.mean()
        return np.ones_like(std) if kind == "none" else 1 / (jacobian * (std / jacobian).mean())


@dataclasses.dataclass(frozen=True)
class AnchorPlan(Plan):
    """The plan of an anchor and groups that branch off it, each sample by one random step; see the module's docstring.

    All of it is static, and `schedule` empty, but in a plan whose noise adapts (`rl.adaptive`).

    Attributes:
      memory: the share of what it was that the running mean of rewards keeps, by which one of `candidates` is chosen.
    """

    memory: float = 0.8

    updates_by_step: ClassVar[bool] = True

    @property
    def groups(self) -> tuple[str, ...]:
        """One for each active step."""
        return tuple(f"step_{branch.step}" for branch in self.branches)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One: a group shares its latents."""
        return (Block(len(self.branches), self.group_size),)

    @property
    def shared_passes(self) -> int:
        """The anchors'; branching needs none."""
        return self.candidates * self.num_steps

    @property
    def own_passes(self) -> int:
        """The tails'."""
        tails = itertools.product(self.branches, self.tail_solvers)
        return self.group_size * sum(tail_steps(solver, self.times, branch.stop) for branch, solver in tails)

    def shares_code(self, other: Plan) -> bool:
        """Only if it is the same."""
        static = lambda plan: (plan.times, plan.branches, plan.group_size, plan.tail_solvers, plan.seeds)
        return isinstance(other, AnchorPlan) and static(self) == static(other)

    def schedule(self) -> Any:
        """Nothing; or the noise of its steps, `[E]`."""
        return ()

    def deal(self, num_rows: int, workers: int, slots: int | None) -> Deal:
        """The tails."""
        return deal_tails(self, num_rows, workers, slots)

    def roll_out(
        self,
        velocity_fn: VelocityFn,
        params: Any,
        deal: Any,
        schedule: Any,
        conditioning: Any,
        keys: chex.Array,
        shape: tuple[int, int],
    ) -> Rollout:
        """See `Plan`; the states are those of all of a worker's rollouts, also where it shares their tails.

        With `candidates` the conditioning is a pair: of the prompts that were chosen, and their `Anchors`.
        """
        anchors, noises = None, None if isinstance(schedule, tuple) else schedule
        if self.candidates > 1:
            conditioning, anchors = conditioning
        return roll_out(velocity_fn, params, self, deal, conditioning, keys, shape, anchors, noises)

    def noise(self, keys: chex.Array, steps: chex.Array, shape: tuple[int, int]) -> chex.Array:
        """The noise of all samples at K grid steps, `[P, K, G, *shape]`."""
        return step_noise(keys, steps, jnp.arange(self.group_size), shape)

    def gather(self, transitions: tuple[Transitions, ...], num_rows: int, workers: int) -> tuple[Transitions, ...]:
        """One row of each rollout."""
        rows = first_rows(num_rows, workers)
        if len(rows) == len(transitions[0].time):
            return transitions
        return jax.tree.map(lambda x: x[rows], transitions)


def describe(plan: Plan, model_passes: int = 1) -> str:
    """A table of the plan's random steps and a line of its cost, for people; a velocity takes `model_passes`."""
    lines = [" step   time  ->  time  merge  e^(h/d)  unmerged"] if plan.branches else ["no random steps"]
    for branch in plan.branches:
        lines.append(
            f"{branch.step:5d}  {plan.times[branch.step]:.4f} -> {plan.times[branch.stop]:.4f}  {branch.merge:5d}  "
            f"{branch.exp_entropy:7.3f}  {branch.unmerged_exp_entropy:8.3f}"
            + ("  clamped: no merge comes to the threshold" if branch.clamped else "")
        )
    lines.append(
        f"for each prompt: {plan.rollout_passes} forward passes and {plan.images} images in the rollout, "
        f"{plan.training_passes} forward and backward passes in the update"
        + (f", each of them {model_passes} of the model, with guidance" if model_passes > 1 else "")
    )
    return "\n".join(lines)
