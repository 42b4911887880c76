"""The work of an iteration, dealt to equal workers before anything is compiled.

A worker is a device, or a team of devices that splits each product. P prompts are dealt to D workers first. If there
are more workers than divide the prompts, gcd(P, D) teams each take some prompts whole, and the members of a team share
their samples; only the anchors' walks, and what follows from them without the model, are repeated within a team.

All tables are NumPy arrays whose axes of workers are merged into the first one that a worker has more of, so that they
are cut as samples are.
"""

from __future__ import annotations

import heapq
import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # a plan deals its own work
    from egrpo_jax.rl.plan import AnchorPlan


class Tails(NamedTuple):
    """The tails of D workers, M each, and the order in which S slots of each walk them in L passes of the model.

    Attributes:
      start: `[D M]`; the sample that a tail starts from, of the worker's own P' E G.
      carried: `[L, D S]`; which of the worker's tails a slot carries at each pass; M if none.
      time, next_time, weight: `[L, D S]`; from where to where, equal if the slot carries none; and the solver's weight.
      sample: `[D M]`; the place of its end in `[P, E, R, G]`; -1 for one that only fills up.
    """

    start: np.ndarray
    carried: np.ndarray
    time: np.ndarray
    next_time: np.ndarray
    weight: np.ndarray
    sample: np.ndarray

    @property
    def busy(self) -> float:
        """The share of slots that carry a tail, over all passes."""
        return float((self.time != self.next_time).mean())

    def worker_axes(self) -> Tails:
        """For each array the axis of which a worker has its part."""
        return Tails._make((0, 1, 1, 1, 1, 0))


class Candidates(NamedTuple):
    """Prompts whose anchors are scored.

    Attributes:
      sample: the prompt that each end of D workers is of, `[D P']`; -1 for one that another worker has too.
    """

    sample: np.ndarray


class States(NamedTuple):
    """The trained states of D workers in U updates of M micro-batches of B each: `[U, D M, B]`.

    Attributes:
      prompt: of the worker's own P'.
      state: of the prompt's.
      weight: sums to its share of an update; 0 for a state that only fills up.
    """

    prompt: np.ndarray
    state: np.ndarray
    weight: np.ndarray


def deal_prompts(num_prompts: int, workers: int) -> np.ndarray:
    """The prompts of each worker, `[D, P']`."""
    teams, members, each = _teams(num_prompts, workers)
    return np.repeat(np.arange(num_prompts).reshape(teams, each), members, axis=0)


def first_rows(num_prompts: int, workers: int) -> np.ndarray:
    """The row of `deal_prompts`, made flat, in which each prompt comes first: `[P]`."""
    return np.unique(deal_prompts(num_prompts, workers), return_index=True)[1]


def deal_candidates(count: int, workers: int) -> Candidates:
    """The ends of `count` anchors, of which those that the members of a team repeat count once."""
    rows, first = deal_prompts(count, workers).ravel(), first_rows(count, workers)
    sample = np.full(len(rows), -1)
    sample[first] = np.arange(count)
    return Candidates(sample)


def default_slots(plan: AnchorPlan, num_prompts: int, workers: int) -> int:
    """As many slots of a worker as carry a group of each of its prompts."""
    _, members, each = _teams(num_prompts, workers)
    return math.ceil(each * plan.group_size / members)


def deal_tails(plan: AnchorPlan, num_prompts: int, workers: int, slots: int | None = None) -> Tails:
    """The tails of `plan` on `slots` slots of each worker, by default `default_slots`: the longest first."""
    teams, members, each = _teams(num_prompts, workers)
    slots = slots or default_slots(plan, num_prompts, workers)
    shape = (each, len(plan.branches), len(plan.tail_solvers), plan.group_size)
    lengths = np.array([len(_path(plan, shape, tail)) for tail in range(math.prod(shape))])
    queues = _queues(lengths, members * slots)
    # Every so-manieth slot is a member's: tails of one length then come to all members alike.
    own = [queues[member::members] for member in range(members)]
    shares = [sorted(itertools.chain(*slots_of_one)) for slots_of_one in own]
    most = max(map(len, shares))
    passes = max(lengths[queue].sum() for queue in queues if queue)
    tables = [_walk(plan, shape, *pair, most, passes) for pair in zip(own, shares, strict=True)]
    filled = np.array([share + share[-1:] * (most - len(share)) for share in shares])
    prompt, active, _, sample = np.unravel_index(filled, shape)
    start = np.ravel_multi_index((prompt, active, sample), (each, len(plan.branches), plan.group_size))
    is_own = np.arange(most) < np.array([[len(share)] for share in shares])
    ends = filled + math.prod(shape) * np.arange(teams)[:, None, None]
    columns = (np.tile(np.concatenate(column, axis=1), (1, teams)) for column in zip(*tables, strict=True))
    return Tails._make((np.tile(start.ravel(), teams), *columns, np.where(is_own, ends, -1).ravel()))


def deal_states(
    num_prompts: int,
    num_states: int,
    workers: int,
    updates: int = 1,
    micro_batch: int | None = None,
    share: float = 1.0,
) -> States:
    """The trained states of all P prompts, so many of each, in `updates` parts: state i is of part i % updates.

    A worker's states of an update come in micro-batches of `micro_batch`, by default all at once; states of weight 0
    fill up what is not whole. The weights of an update sum to `share`, where there may be other states in it; those of
    parts that are larger or smaller than the average to more or less.
    """
    teams, members, each = _teams(num_prompts, workers)
    rounds = math.ceil(num_states / updates)
    on_each = math.ceil(rounds * each / members)
    batch = min(micro_batch or on_each, on_each)
    padded = math.ceil(on_each / batch) * batch * members
    turn, prompt = np.divmod(np.minimum(np.arange(padded), rounds * each - 1), each)
    state = turn * updates + np.arange(updates)[:, None]
    real = (state < num_states) & (np.arange(padded) < rounds * each)
    weight = np.where(real, share / (num_prompts * num_states / updates), 0.0).astype(np.float32)

    def cut(table: np.ndarray) -> np.ndarray:
        # State i is the member i % members': those that fill up come to all members alike.
        of_team = np.broadcast_to(table, (updates, padded)).reshape(updates, -1, members).swapaxes(1, 2)
        return np.tile(of_team.reshape(updates, -1, batch), (1, teams, 1))

    return States(cut(prompt), cut(np.minimum(state, num_states - 1)), cut(weight))


def _teams(num_prompts: int, workers: int) -> tuple[int, int, int]:
    """The number of teams, of members of each, and of prompts of each."""
    teams = math.gcd(num_prompts, workers)
    return teams, workers // teams, num_prompts // teams


def _path(plan: AnchorPlan, shape: tuple[int, ...], tail: int) -> list[tuple[float, float, float]]:
    """The steps of a tail, of `shape` (P', E, R, G) made flat: from one time to the next, and the solver's weight."""
    _, active, which, _ = np.unravel_index(tail, shape)
    solver = plan.tail_solvers[which]
    nodes = solver.nodes(plan.times, plan.branches[active].stop)
    return list(zip(nodes[:-1], nodes[1:], solver.weights(nodes), strict=True))


def _queues(lengths: np.ndarray, slots: int) -> list[list[int]]:
    """The tails of each slot: the longest that is left goes to the slot with the least to do, then with the fewest."""
    queues: list[list[int]] = [[] for _ in range(slots)]
    loads = [(0, 0, slot) for slot in range(slots)]
    for tail in np.argsort(-lengths, kind="stable"):
        load, count, slot = loads[0]
        queues[slot].append(int(tail))
        heapq.heapreplace(loads, (load + int(lengths[tail]), count + 1, slot))
    return queues


def _walk(
    plan: AnchorPlan, shape: tuple[int, ...], queues: list[list[int]], share: list[int], most: int, passes: int
) -> tuple[np.ndarray, ...]:
    """`carried`, `time`, `next_time` and `weight`, `[L, S]`, of one worker, whose tails are `share`."""
    carried = np.full((passes, len(queues)), most, np.int32)
    walked = np.zeros((3, passes, len(queues)), np.float32)
    for slot, queue in enumerate(queues):
        steps = [(share.index(tail), *step) for tail in queue for step in _path(plan, shape, tail)]
        if steps:
            rows, *numbers = zip(*steps, strict=True)
            carried[: len(steps), slot], walked[:, : len(steps), slot] = rows, numbers
    return carried, *walked
