"""Plans of several random steps, one after another: chains of samples, windows of random steps, trees.

A rollout walks from its initial noises, its *roots*, deterministically to its first random step. Each of the K random
steps then takes every state that there is to so many *children*: one in a chain, all samples of the group at once where
they part, two where a tree splits. Tails carry the G samples, the leaves, to images. The ancestors of a sample are
computed once, forward and backward. Where the random steps begin may move with the iteration: all numbers of a plan
are arguments of its compiled code.

If a prompt's samples are shared among several workers, each takes leaves that are neighbours, and their ancestors.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, ClassVar, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.flow.solver import VelocityFn, tail_steps
from egrpo_jax.flow.transition import draw, euler_step, log_prob
from egrpo_jax.rl.advantage import over_parts
from egrpo_jax.rl.plan import Block, Normalise, Plan
from egrpo_jax.rl.transitions import Rollout, Transitions, group_kernel, initial_noise, step_noise

_KEPT = 2**30
"""Folded into a rollout's key for the choice of trained steps; no grid step has this number."""


class Run(NamedTuple):
    """Random steps alike: `length` of them from the `first` on, from `width` states each, to `children` of each."""

    first: int
    length: int
    width: int
    children: int


class Leaves(NamedTuple):
    """The samples of D workers.

    Attributes:
      first: the first sample of its prompt that a worker walks, `[D]`.
      sample: `[D M]`; the place of its end in `[P, 1, 1, G]`.
    """

    first: np.ndarray
    sample: np.ndarray

    def worker_axes(self) -> Leaves:
        """For each array the axis of which a worker has its part."""
        return Leaves(0, 0)  # type: ignore[arg-type]


class TreeSchedule(NamedTuple):
    """The numbers of an iteration; tables of walks are filled up to a length of T.

    Attributes:
      prefix: how many deterministic steps come first, `[]`.
      times: the grid, `[T + 1]`.
      steps: the grid step, time, next time and noise of each random step, each `[K]`.
      tail: how many steps a tail has, `[]`.
      walk: time, next time and the solver's weight of each of these, each `[T]`.
      kept: which steps of the last run train, `[C]`; empty if each sample draws its own, or all do.
    """

    prefix: np.ndarray
    times: np.ndarray
    steps: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    tail: np.ndarray
    walk: tuple[np.ndarray, np.ndarray, np.ndarray]
    kept: np.ndarray


@dataclasses.dataclass(frozen=True)
class TreePlan(Plan):
    """The plan of a tree of samples; see the module's docstring. Its random steps follow each other on the grid.

    Attributes:
      roots: initial noises of a rollout: 1, or one for each sample.
      children: of each state at each random step; with `roots` they multiply to `group_size`.
      kept: how many steps of the last run train, of those after the last split; None for all.
      kept_steps: which of them, counted within the run; None if each sample draws its own.
      leaves: the samples whose steps of the last run train: all; the best half of those that the last split parts; or
        the best and the worst quarter of all.
      by_depth: samples are compared at each random step with those that are as deep in the tree, by the mean reward of
        the leaves below them, and not by their own image alone.
    """

    roots: int = 1
    children: tuple[int, ...] = ()
    kept: int | None = None
    kept_steps: tuple[int, ...] | None = None
    leaves: Literal["all", "best_half", "extremes"] = "all"
    by_depth: bool = False

    updates_by_step: ClassVar[bool] = False

    @property
    def widths(self) -> tuple[int, ...]:
        """The states before each random step, and the samples after the last: `[K + 1]`."""
        return tuple(itertools.accumulate(self.children, lambda width, count: width * count, initial=self.roots))

    @property
    def runs(self) -> tuple[Run, ...]:
        """The random steps, those that follow each other without a split together."""
        runs, step = [], 0
        for splits, group in itertools.groupby(self.children, lambda count: count > 1):
            counts = list(group)
            lengths = [1] * len(counts) if splits else [len(counts)]
            for length in lengths:
                runs.append(Run(step, length, self.widths[step], self.children[step]))
                step += length
        return tuple(runs)

    @property
    def groups(self) -> tuple[str, ...]:
        """One: all samples."""
        return ("group",)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One for each number of children."""
        trained = [(run.children, self._width(run) * self._trained(run)) for run in self.runs]
        return tuple(
            Block(sum(states for children, states in trained if children == size), size) for size in self._sizes
        )

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(sorted({run.children for run in self.runs}, reverse=True))

    def _width(self, run: Run) -> int:
        """The states of each of its steps that train."""
        return run.width if self.leaves == "all" or run != self.runs[-1] else run.width // 2

    def _trained(self, run: Run) -> int:
        """The steps of a run that train."""
        return run.length if self.kept is None or run != self.runs[-1] else self.kept

    @property
    def shared_passes(self) -> int:
        """Those from a single state: from the only root up to where samples part, if there is one root."""
        alone = self.branches[0].step * (self.roots == 1)
        return alone + sum(width == 1 for width in self.widths[:-1])

    @property
    def own_passes(self) -> int:
        """All others, the tails' among them."""
        before = self.branches[0].step * self.roots * (self.roots > 1)
        return before + sum(width for width in self.widths[:-1] if width > 1) + self.group_size * self._tail_steps

    @property
    def _tail_steps(self) -> int:
        return tail_steps(self.tail_stepper, self.times, self.branches[-1].stop)

    def shares_code(self, other: Plan) -> bool:
        """If it has as many random steps, splits, samples and trained steps, wherever on the grid they are."""
        names = ("num_steps", "group_size", "roots", "children", "kept", "leaves", "by_depth")
        shape = lambda plan: [getattr(plan, name) for name in names]
        return isinstance(other, TreePlan) and shape(self) == shape(other)

    def schedule(self) -> TreeSchedule:
        """See `TreeSchedule`."""
        tail, walk = self._walk(self.branches[-1].stop)
        rows = [(b.step, self.times[b.step], self.times[b.stop], b.noise) for b in self.branches]
        steps, *numbers = zip(*rows, strict=True)
        return TreeSchedule(
            prefix=np.array(self.branches[0].step, np.int32),
            times=np.array(self.times, np.float32),
            steps=(np.array(steps, np.int32), *(np.array(x, np.float32) for x in numbers)),  # type: ignore[arg-type]
            tail=tail,
            walk=walk,
            kept=np.array(self.kept_steps or (), np.int32),
        )

    def _walk(self, start: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """`tail` and `walk` of a schedule, from grid step `start` on."""
        nodes = self.tail_stepper.nodes(self.times, start)
        weights = self.tail_stepper.weights(nodes)
        full = lambda values: np.array([*values, *[0.0] * (self.num_steps - len(values))], np.float32)
        return np.array(len(weights), np.int32), (full(nodes[:-1]), full(nodes[1:]), full(weights))

    def deal(self, num_rows: int, workers: int, slots: int | None) -> Leaves:
        """The samples; each worker walks all of its own at once. Raises ConfigError if they cannot be shared."""
        del slots
        teams = math.gcd(num_rows, workers)
        members, each = workers // teams, num_rows // teams
        if any(width % members and members % width for width in self.widths):
            expected = f"a multiple of the {workers} devices, or a number of which each gets a part of a prompt's tree"
            raise ConfigError("prompts_per_iteration", num_rows // self.seeds, expected)
        share = self.group_size // members
        first = np.tile(np.arange(members) * share, teams)
        place = np.arange(num_rows * self.group_size).reshape(teams, each, members, share)
        return Leaves(first.astype(np.int32), place.swapaxes(1, 2).ravel())

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
        """See `Plan`; the states are those on the way to a worker's own samples."""
        walker = Walker(self, velocity_fn, params, schedule, conditioning, keys, deal.first[0], len(deal.sample))
        x = walker.to_first_step(walker.roots(shape))
        parts: dict[int, list[Transitions]] = {size: [] for size in self._sizes}
        for run in self.runs:
            transitions, x = walker.random_steps(run, x)
            parts[run.children].append(transitions)
        together = lambda *parts: jnp.concatenate(parts, axis=1)
        blocks = tuple(jax.tree.map(together, *parts[size]) for size in self._sizes)
        return Rollout(blocks, walker.tails(x).reshape(-1, *shape))

    def gather(self, transitions: tuple[Transitions, ...], num_rows: int, workers: int) -> tuple[Transitions, ...]:
        """Each state from the first of the workers that have it."""
        teams = math.gcd(num_rows, workers)
        members, each = workers // teams, num_rows // teams
        if members == 1:
            return transitions

        def merge(children: int, x: chex.Array) -> chex.Array:
            owner, place = self._places(children, members)
            found = x.reshape(teams, members, each, *x.shape[1:])[:, owner, :, place]
            return jnp.moveaxis(found, 0, 2).reshape(num_rows, len(owner), *x.shape[2:])

        sizes = zip(self._sizes, transitions, strict=True)
        return tuple(jax.tree.map(functools.partial(merge, size), block) for size, block in sizes)

    def _places(self, children: int, members: int) -> tuple[np.ndarray, np.ndarray]:
        """For each state of a block, the first of the workers that share a rollout to have it, and its place there."""
        owners, places, taken = [], [], 0
        for run in self.runs:
            if run.children == children:
                length, own = self._trained(run), max(1, run.width // members)
                state = np.arange(run.width)
                owner = state * members // run.width
                owners += [owner] * length
                places += [taken + step * own + state - owner * run.width // members for step in range(length)]
                taken += length * own
        return np.concatenate(owners), np.concatenate(places)

    def prune(self, transitions: tuple[Any, ...], advantage: chex.Array) -> tuple[Any, ...]:
        """See `Plan`: of the last run the steps of the samples that `leaves` says, by their advantage at its end."""
        if self.leaves == "all":
            return transitions
        last, kept = self.runs[-1], self._chosen(advantage[:, -1])
        rows, count = jnp.arange(len(kept)), self._trained(last) * last.width

        def chosen(x: chex.Array) -> chex.Array:
            before, of_last = x[:, :-count], x[:, -count:]
            steps = of_last.reshape(len(x), -1, last.width, *x.shape[2:])
            own = steps[rows[:, None, None], jnp.arange(steps.shape[1])[:, None], kept[:, None]]
            return jnp.concatenate([before, own.reshape(len(x), -1, *x.shape[2:])], axis=1)

        *others, singles = transitions  # blocks come by their number of children, of which the last run has one
        return (*others, jax.tree.map(chosen, singles))

    def _chosen(self, advantage: chex.Array) -> chex.Array:
        """Half of the samples, `[P, G / 2]`, by their advantages `[P, G]`."""
        if self.leaves == "extremes":
            order, quarter = jnp.argsort(advantage), self.group_size // 4
            return jnp.sort(jnp.concatenate([order[:, :quarter], order[:, -quarter:]], axis=1))
        siblings = next(count for count in reversed(self.children) if count > 1)
        branches = advantage.reshape(len(advantage), -1, siblings)
        best = jnp.argsort(branches)[..., siblings - siblings // 2 :]
        first = siblings * jnp.arange(branches.shape[1])[:, None]
        return jnp.sort((first + best).reshape(len(advantage), -1))

    def credit(self, normalise: Normalise, values: Any, came: chex.Array) -> chex.Array:
        """See `Plan`: at each random step the advantage of the sample, or of its ancestor among all of that depth."""
        at = lambda width: super(TreePlan, self).credit(
            normalise, {name: over_parts(value, width) for name, value in values.items()}, over_parts(came, width)
        )
        widths = self.widths[1:] if self.by_depth else (self.group_size,) * len(self.children)
        found = {width: jnp.repeat(at(width), self.group_size // width, axis=-1) for width in sorted(set(widths))}
        return jnp.concatenate([found[width] for width in widths], axis=1)


@dataclasses.dataclass(frozen=True)
class Walker:
    """A worker's walk along its part of the trees: states `[P, W, N, D]`, W being those that its own samples pass."""

    plan: TreePlan
    velocity_fn: VelocityFn
    params: Any
    schedule: TreeSchedule
    conditioning: Any
    keys: chex.Array
    first: chex.Array
    ends: int

    @property
    def _share(self) -> int:
        """Samples of each rollout that are its own."""
        return self.ends // len(self.keys)

    def _width(self, width: int) -> int:
        """Of so many states of a rollout, those that its own samples pass."""
        return max(1, width * self._share // self.plan.group_size)

    def numbers(self, width: int) -> chex.Array:
        """The numbers of these states, among all."""
        return self.first * width // self.plan.group_size + jnp.arange(self._width(width))

    def roots(self, shape: tuple[int, int]) -> chex.Array:
        """The initial noises."""
        if self.plan.roots == 1:
            return initial_noise(self.keys, shape)[:, None]
        own = lambda key: jax.vmap(lambda number: jax.random.fold_in(key, number))(self.numbers(self.plan.roots))
        return jax.vmap(lambda key: initial_noise(own(jax.random.fold_in(key, _KEPT)), shape))(self.keys)

    def velocity(self, x: chex.Array, time: chex.Array) -> chex.Array:
        """The velocity of all states, which are at one time."""
        flat = x.reshape(-1, *x.shape[2:])
        of_each = jax.tree.map(lambda leaf: jnp.repeat(leaf, x.shape[1], axis=0), self.conditioning)
        return self.velocity_fn(self.params, flat, jnp.broadcast_to(time, flat.shape[:1]), of_each).reshape(x.shape)

    @jax.named_scope("prefixes")
    def to_first_step(self, x: chex.Array) -> chex.Array:
        """The deterministic steps before the first random one."""
        times = jnp.asarray(self.schedule.times)
        step = lambda i, x: euler_step(x, self.velocity(x, times[i]), times[i], times[i + 1])
        return jax.lax.fori_loop(0, self.schedule.prefix, step, x)

    @jax.named_scope("random_steps")
    def random_steps(self, run: Run, x: chex.Array) -> tuple[Transitions, chex.Array]:
        """The steps of `run`, of which those that train are kept, and the states after them."""
        rows = jnp.arange(run.first, run.first + run.length)
        table = (rows, *(jnp.asarray(column)[run.first : run.first + run.length] for column in self.schedule.steps))
        if run.children > 1:
            transitions, x = self._random_step(run, x, tuple(column[0] for column in table))
            return transitions, x
        x, steps = jax.lax.scan(lambda x, row: self._random_step(run, x, row)[::-1], x, table)
        if self.plan.kept is not None and run == self.plan.runs[-1]:
            steps = self._kept(steps)
        flat = lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(leaf.shape[1], -1, *leaf.shape[3:])
        return jax.tree.map(flat, steps), x

    def _random_step(self, run: Run, x: chex.Array, row: tuple[chex.Array, ...]) -> tuple[Transitions, chex.Array]:
        """A random step of all states to all children, and those of them that are the worker's own."""
        index, step, *numbers = row
        states = x.shape[:2]
        time, next_time, noise = (jnp.broadcast_to(number, states) for number in numbers)
        kernel = group_kernel(self.plan.process, x, self.velocity(x, numbers[0]), time, next_time, noise)
        children = (self.numbers(run.width)[:, None] * run.children + jnp.arange(run.children)).ravel()
        fresh = step_noise(self.keys, step[None], children, x.shape[2:])
        there = draw(kernel, fresh.reshape(*states, run.children, *x.shape[2:]))
        density = log_prob(kernel, there)
        sample = (children * (self.plan.group_size // (run.width * run.children))).reshape(states[1], -1)
        whole = [jnp.broadcast_to(index, states), jnp.broadcast_to(sample, density.shape)]
        kept = Transitions(x, there, time, next_time, noise, density, *whole)
        after = there.reshape(states[0], -1, *x.shape[2:])
        own = self.numbers(run.width * run.children)
        return kept, after if len(own) == len(children) else after[:, own - children[0]]

    def _kept(self, steps: Transitions) -> Transitions:
        """Of transitions `[L, P, W]` those that train: the schedule's, or so many that each sample draws."""
        if self.plan.kept_steps is not None:
            return jax.tree.map(lambda leaf: leaf[jnp.asarray(self.schedule.kept)], steps)
        length, (_, width) = len(steps.time), steps.time.shape[1:]

        def chosen(key: chex.Array, number: chex.Array) -> chex.Array:
            key = jax.random.fold_in(jax.random.fold_in(key, _KEPT), number)
            return jnp.sort(jax.random.permutation(key, length)[: self.plan.kept])

        of_samples = jax.vmap(chosen, (None, 0))
        rows = jax.vmap(of_samples, (0, None))(self.keys, self.numbers(self.plan.group_size))  # [P, W, C]
        prompt, state = jnp.arange(len(self.keys))[:, None], jnp.arange(width)
        return jax.tree.map(lambda leaf: leaf[jnp.moveaxis(rows, -1, 0), prompt, state], steps)

    @jax.named_scope("tails")
    def tails(self, x: chex.Array) -> chex.Array:
        """The samples at t = 0."""
        solver, walk = self.plan.tail_stepper, [jnp.asarray(column) for column in self.schedule.walk]

        def step(i: chex.Array, carry: tuple[chex.Array, Any]) -> tuple[chex.Array, Any]:
            x, history = carry
            time, next_time, weight = (column[i] for column in walk)
            return solver.step(x, self.velocity(x, time), time, next_time, weight, history)

        return jax.lax.fori_loop(0, self.schedule.tail, step, (x, solver.history(x)))[0]
