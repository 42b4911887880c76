"""Work dealt to equal workers: nothing is lost, nothing done twice, the shares alike."""

import math

import numpy as np
import pytest

from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.deal import deal_prompts, deal_states, deal_tails, first_rows

PLAN = EGrpo(num_steps=8, group_size=3, tail_strides=(1, 3)).make_plan()
SHAPES = [(4, 1), (4, 2), (4, 4), (1, 4), (6, 4), (3, 4), (2, 16)]
"""Prompts and workers."""


@pytest.mark.parametrize(("prompts", "workers"), SHAPES)
def test_prompts_come_whole_to_as_few_workers_as_can_be(prompts, workers):
    rows = deal_prompts(prompts, workers)
    assert len(rows) == workers
    assert rows.size == math.lcm(prompts, workers)
    np.testing.assert_array_equal(rows.ravel()[first_rows(prompts, workers)], np.arange(prompts))


@pytest.mark.parametrize(("prompts", "workers"), SHAPES)
@pytest.mark.parametrize("slots", [None, 1, 2, 7])
def test_every_tail_is_walked_once_from_its_sample_to_the_end(prompts, workers, slots):
    tails, rows = deal_tails(PLAN, prompts, workers, slots), deal_prompts(prompts, workers)
    own = tails.sample[tails.sample >= 0]
    np.testing.assert_array_equal(np.sort(own), np.arange(prompts * PLAN.decodes))

    shape = (prompts, len(PLAN.branches), len(PLAN.tail_solvers), PLAN.group_size)
    each = len(tails.start) // workers
    columns = (
        np.split(tails.carried, workers, 1),
        np.split(tails.time, workers, 1),
        np.split(tails.next_time, workers, 1),
    )
    for worker in range(workers):
        carried, time, next_time = (column[worker] for column in columns)
        for tail in range(each):
            sample, start = (table[worker * each + tail] for table in (tails.sample, tails.start))
            if sample < 0:
                assert not (carried == tail).any()
                continue
            prompt, active, stride, member = np.unravel_index(sample, shape)
            of_worker, *state = np.unravel_index(start, (rows.shape[1], shape[1], shape[3]))
            assert rows[worker, of_worker] == prompt
            assert state == [active, member]
            at, slot = np.nonzero(carried == tail)
            stops = [*range(PLAN.branches[active].stop, 8, PLAN.tail_solvers[stride].stride), 8]
            times = np.array(PLAN.times, np.float32)[stops]
            np.testing.assert_array_equal(time[at, slot], times[:-1])
            np.testing.assert_array_equal(next_time[at, slot], times[1:])
            assert len(set(slot)) <= 1  # and in one go
            np.testing.assert_array_equal(at, at[0] + np.arange(len(at)) if len(at) else at)


def test_slots_that_divide_evenly_are_all_busy():
    """The paper's plan: 8 prompts of 96 tails on 4 devices of 12 slots."""
    plan = EGrpo().make_plan()
    assert deal_tails(plan, 8, 4, 12).busy > 0.999
    assert deal_tails(plan, 1, 8).busy > 0.98
    assert deal_tails(plan, 8, 1).carried.shape == (83, 96)


def test_one_worker_walks_groups_in_step():
    """By default as many slots as samples of one active step: each pass is at one time, as without a queue."""
    tails = deal_tails(EGrpo().make_plan(), 2, 1)
    assert (tails.time == tails.time[:, :1]).all()


@pytest.mark.parametrize(("prompts", "workers"), SHAPES)
@pytest.mark.parametrize(("updates", "micro_batch"), [(1, None), (1, 3), (5, None), (5, 1)])
def test_every_state_is_trained_once(prompts, workers, updates, micro_batch):
    states, rows = deal_states(prompts, 5, workers, updates, micro_batch), deal_prompts(prompts, workers)
    np.testing.assert_allclose(states.weight.sum((1, 2)), 1.0, rtol=1e-6)
    seen = []
    for update in range(updates):
        parts = zip(*(np.split(table[update], workers) for table in states), strict=True)
        for worker, (prompt, active, weight) in enumerate(parts):
            assert micro_batch is None or prompt.shape[1] <= micro_batch
            real = weight > 0
            seen += [(update, rows[worker, p], a) for p, a in zip(prompt[real], active[real], strict=True)]
    assert len(seen) == len(set(seen)) == prompts * 5
    assert updates == 1 or all(update == active for update, _, active in seen)
