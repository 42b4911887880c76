"""The solver against a plain Python loop."""

import itertools

import chex
import jax
import jax.numpy as jnp
import pytest

from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.flow.solver import solve, solve_path, tail_steps
from tests import toy

TIMES = jnp.array(shifted_times(7, 3.0), jnp.float32)
PARAMS, TEXT = toy.params(), toy.conditioning(4)
START = jax.random.normal(jax.random.key(0), (4, *toy.SHAPE))


def by_hand(x, indices):
    path = [x]
    for i, j in itertools.pairwise(indices):
        x = x - (TIMES[i] - TIMES[j]) * toy.velocity(PARAMS, x, jnp.full(4, TIMES[i]), TEXT)
        path.append(x)
    return path


def test_path_equals_a_plain_loop():
    final, path, velocities = jax.jit(solve_path, static_argnums=0)(toy.velocity, PARAMS, START, TIMES, TEXT)
    expected = by_hand(START, list(range(8)))
    chex.assert_trees_all_close(path, jnp.stack(expected[:-1]), atol=1e-6)
    chex.assert_trees_all_close(final, expected[-1], atol=1e-6)
    chex.assert_trees_all_close(velocities[3], toy.velocity(PARAMS, path[3], jnp.full(4, TIMES[3]), TEXT), atol=1e-6)


@pytest.mark.parametrize(
    ("start", "stride", "indices"),
    [(0, 1, range(8)), (3, 1, range(3, 8)), (2, 2, [2, 4, 6, 7]), (1, 3, [1, 4, 7]), (6, 4, [6, 7]), (7, 1, [7])],
)
def test_tail_equals_a_plain_loop(start, stride, indices):
    indices = list(indices)
    solved = jax.jit(solve, static_argnums=0)(toy.velocity, PARAMS, START, TIMES, TEXT, start, stride)
    chex.assert_trees_all_close(solved, by_hand(START, indices)[-1], atol=1e-6)
    assert tail_steps(7, start, stride) == len(indices) - 1


def test_one_compilation_serves_every_start():
    traces = []

    def traced(*args):
        traces.append(1)
        return toy.velocity(*args)

    tail = jax.jit(lambda start: solve(traced, PARAMS, START, TIMES, TEXT, start, 1))
    for start in range(7):
        tail(start)
    assert len(traces) == 1
