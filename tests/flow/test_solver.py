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


def test_solving_equals_the_end_of_the_path():
    solved = jax.jit(solve, static_argnums=0)(toy.velocity, PARAMS, START, TIMES, TEXT)
    chex.assert_trees_all_close(solved, by_hand(START, list(range(8)))[-1], atol=1e-6)


@pytest.mark.parametrize(
    ("start", "stride", "steps"), [(0, 1, 7), (3, 1, 4), (2, 2, 3), (1, 3, 2), (6, 4, 1), (7, 1, 0)]
)
def test_steps_of_a_tail(start, stride, steps):
    """A last step that the stride does not divide is shorter."""
    assert tail_steps(7, start, stride) == steps
