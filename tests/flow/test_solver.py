"""The solvers against plain loops, formulas restated in NumPy float64, and an ODE whose solution is known."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.flow.solver import DpmSolver2M, Euler, solve, solve_path, tail_steps
from egrpo_jax.flow.transition import euler_step
from tests import toy
from tests.flow.gaussians import mixture_velocity

GRID = shifted_times(7, 3.0)
TIMES = jnp.array(GRID, jnp.float32)
PARAMS, TEXT = toy.params(), toy.conditioning(4)
START = jax.random.normal(jax.random.key(0), (4, *toy.SHAPE))
PAPER = shifted_times(16, 3.0)
EXACT = 1.331488  # where the ODE of data N(.5, .36) goes from x = 1.3 at t = .9
PUBLISHED = {  # Euler and 2M on the same times: x = 1.3 at t = .9, data N(.5, .36), s = 3
    2: (0.754425, 0.754425),
    3: (0.899431, 0.908817),
    4: (0.994243, 1.019502),
    6: (1.098382, 1.155871),
    8: (1.152518, 1.231046),
    12: (1.208749, 1.300370),
}


def by_hand(x, indices):
    path = [x]
    for i, j in itertools.pairwise(indices):
        x = x - (TIMES[i] - TIMES[j]) * toy.velocity(PARAMS, x, jnp.full(4, TIMES[i]), TEXT)
        path.append(x)
    return path


def walk(solver, velocity, times, start, x):
    """`solver` from `times[start]` on, one step after another."""
    nodes = solver.nodes(times, start)
    history = solver.history(x)
    for (time, next_time), weight in zip(itertools.pairwise(nodes), solver.weights(nodes), strict=True):
        v = velocity(None, x, jnp.full(len(x), time), None)
        x, history = solver.step(x, v, *map(jnp.float32, (time, next_time, weight)), history)
    return x


def second_order(predict, x, nodes):
    """DPM-Solver++(2M) in the form of its paper, sigma = t, alpha = 1 - t, in float64; first and last step of order 1.

    `predict` gives x0 of x and t.
    """
    lambdas = [math.log((1 - t) / t) if 0 < t < 1 else math.copysign(math.inf, 0.5 - t) for t in nodes]
    lengths = np.diff(lambdas)
    last = None
    for i, (t, t_next) in enumerate(itertools.pairwise(nodes)):
        data = predict(x, t)
        extrapolated = data
        if 0 < i < len(nodes) - 2:
            ratio = lengths[i - 1] / lengths[i]
            extrapolated = (1 + 1 / (2 * ratio)) * data - 1 / (2 * ratio) * last
        x = t_next / t * x - (1 - t_next) * np.expm1(-lengths[i]) * extrapolated
        last = data
    return x


def gaussian_data(x, t, mean=0.5, variance=0.36):
    """E[x0 | x] of data N(mean, variance)."""
    return mean + (1 - t) * variance / ((1 - t) ** 2 * variance + t**2) * (x - (1 - t) * mean)


def test_path_equals_a_plain_loop():
    final, path, velocities = jax.jit(solve_path, static_argnums=0)(toy.velocity, PARAMS, START, TIMES, TEXT)
    expected = by_hand(START, list(range(8)))
    chex.assert_trees_all_close(path, jnp.stack(expected[:-1]), atol=1e-6)
    chex.assert_trees_all_close(final, expected[-1], atol=1e-6)
    chex.assert_trees_all_close(velocities[3], toy.velocity(PARAMS, path[3], jnp.full(4, TIMES[3]), TEXT), atol=1e-6)


@pytest.mark.parametrize(("stride", "indices"), [(1, range(8)), (3, (0, 3, 6, 7))])
def test_solving_equals_a_plain_loop(stride, indices):
    solved = jax.jit(lambda x: solve(Euler(stride), toy.velocity, PARAMS, x, GRID, TEXT))(START)
    chex.assert_trees_all_close(solved, by_hand(START, indices)[-1], atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_euler_is_the_scan_before_there_were_others(compiled):
    """Operation by operation to the bit; a compiler may fuse the two programs differently."""

    def scan(x):
        def step(x, span):
            time, next_time = span
            velocity = toy.velocity(PARAMS, x, jnp.broadcast_to(time, x.shape[:1]), TEXT)
            return euler_step(x, velocity, time, next_time), None

        return jax.lax.scan(step, x, (TIMES[:-1], TIMES[1:]))[0]

    def solved(x):
        return solve(Euler(), toy.velocity, PARAMS, x, GRID, TEXT)

    def path(x):
        return solve_path(toy.velocity, PARAMS, x, TIMES, TEXT)[0]

    with jax.disable_jit(not compiled):
        results = [jax.jit(f)(START) for f in (scan, solved, path)]
    for result in results[1:]:
        chex.assert_trees_all_close(result, results[0], rtol=0, atol=1e-6 if compiled else 0)


@pytest.mark.parametrize(
    ("start", "stride", "nodes"),
    [
        (0, 1, (0, 1, 2, 3, 4, 5, 6, 7)),
        (3, 1, (3, 4, 5, 6, 7)),
        (2, 2, (2, 4, 6, 7)),  # a last step that the stride does not divide is shorter
        (1, 3, (1, 4, 7)),
        (6, 4, (6, 7)),
        (7, 1, (7,)),
    ],
)
def test_times_of_euler(start, stride, nodes):
    assert Euler(stride).nodes(GRID, start) == tuple(GRID[i] for i in nodes)
    assert tail_steps(Euler(stride), GRID, start) == len(nodes) - 1
    assert Euler(stride).weights(Euler(stride).nodes(GRID, start)) == (0.0,) * (len(nodes) - 1)


@pytest.mark.parametrize(("start", "steps", "taken"), [(0, 6, 6), (4, 6, 6), (13, 6, 3), (15, 6, 1), (16, 6, 0)])
def test_times_of_2m(start, steps, taken):
    nodes = DpmSolver2M(steps).nodes(PAPER, start)
    assert tail_steps(DpmSolver2M(steps), PAPER, start) == taken == len(DpmSolver2M(steps).weights(nodes))
    assert nodes[0] == PAPER[start]
    uniform = np.array(nodes) / (3 - 2 * np.array(nodes))  # u of t = s u / (1 + (s - 1) u)
    np.testing.assert_allclose(uniform, np.linspace(1 - start / 16, 0, taken + 1), atol=1e-14)


def test_as_many_steps_as_are_left_walk_the_grid():
    np.testing.assert_allclose(DpmSolver2M(12).nodes(PAPER, 4), PAPER[4:], atol=1e-14)


@pytest.mark.parametrize(("start", "euler_steps"), [(4, {0, 5}), (0, {0, 1, 5})])
def test_first_and_last_step_are_eulers_and_the_second_from_pure_noise(start, euler_steps):
    weights = DpmSolver2M(6).weights(DpmSolver2M(6).nodes(PAPER, start))
    assert {i for i, weight in enumerate(weights) if weight == 0} == euler_steps
    assert min(weights) == 0


@pytest.mark.parametrize("steps", PUBLISHED)
def test_table_of_a_gaussian(steps):
    nodes = DpmSolver2M(steps).nodes(PAPER, 4)
    velocity, x = mixture_velocity([0.5], 0.6), jnp.full((1, 1, 1), 1.3)
    euler, second = PUBLISHED[steps]
    np.testing.assert_allclose(walk(Euler(), velocity, nodes, 0, x), euler, atol=2e-6)
    np.testing.assert_allclose(walk(DpmSolver2M(steps), velocity, PAPER, 4, x), second, atol=2e-6)
    np.testing.assert_allclose(second_order(gaussian_data, 1.3, nodes), second, atol=5.1e-7)


def test_many_steps_reach_the_exact_solution():
    score = (1.3 - 0.05) / math.sqrt(0.01 * 0.36 + 0.81)  # which the ODE keeps
    np.testing.assert_allclose(0.5 + 0.6 * score, EXACT, atol=5e-7)
    times = shifted_times(4096, 3.0)
    found = second_order(gaussian_data, 1.3, DpmSolver2M(3072).nodes(times, 1024))
    np.testing.assert_allclose(found, EXACT, atol=1e-3)


def test_a_single_step_of_second_order():
    times = (0.95, 0.9, 0.75, 0.0)
    solver, x = DpmSolver2M(3), jnp.full((1, 1, 1), 1.3)
    velocity = mixture_velocity([0.5], 0.6)(None, x, jnp.array([0.9]), None)
    row = map(jnp.float32, (0.9, 0.75, solver.weights(times)[1]))
    found, data = solver.step(x, velocity, *row, jnp.full_like(x, 0.4))
    np.testing.assert_allclose(found, 1.194914, atol=1e-6)
    np.testing.assert_allclose(data, gaussian_data(1.3, 0.9), atol=1e-6)


@pytest.mark.parametrize("num_steps", [2, 3, 6])
def test_2m_over_a_whole_grid_equals_the_papers_form(num_steps):
    times = shifted_times(num_steps, 3.0)
    solve_it = lambda x: solve(DpmSolver2M(num_steps), mixture_velocity([0.5], 0.6), None, x, times, None)
    x = np.float32([[[-1.0], [0.2], [2.0]]])
    found = jax.jit(solve_it)(x)
    np.testing.assert_allclose(found, second_order(gaussian_data, x.astype(np.float64), times), atol=5e-6)


def test_2m_is_nearer_than_euler_on_a_mixture():
    """Root of the mean squared distance to a fine solution, by steps, for two modes at -1 and 1 of width .4."""
    velocity, x = mixture_velocity([-1.0, 1.0], 0.4), jnp.linspace(-2, 2, 41)[None, :, None]
    fine = shifted_times(480, 3.0)
    solve_it = jax.jit(lambda x, solver: solve(solver, velocity, None, x, fine, None), static_argnums=1)
    exact = solve_it(x, Euler())
    for steps in (4, 6, 8):
        euler, second = (
            jnp.sqrt(jnp.mean((solve_it(x, solver) - exact) ** 2))
            for solver in (Euler(480 // steps), DpmSolver2M(steps))
        )
        assert second < euler


@pytest.mark.parametrize("solver", [Euler(), DpmSolver2M(4)])
def test_a_queue_of_walks_at_times_of_their_own(solver):
    """Two slots walk three tails, one after another; a history that is not finite does not reach the next tail."""
    velocity = mixture_velocity([-1.0, 1.0], 0.4)
    x = jnp.linspace(-1, 1.5, 3)[:, None, None] * jnp.ones((3, 2, 1))
    tails = [solver.nodes(PAPER, start) for start in (4, 9, 12)]
    rows = [
        [(i, *span, w) for span, w in zip(itertools.pairwise(nodes), solver.weights(nodes), strict=True)]
        for i, nodes in enumerate(tails)
    ]
    queues = [rows[0] + rows[2], rows[1]]
    passes = max(map(len, queues))
    idle = (3, 0.0, 0.0, 0.0)
    table = np.array([queue + [idle] * (passes - len(queue)) for queue in queues], np.float32).swapaxes(0, 1)

    def advance(carry, row):
        latents, history = carry
        carried, time, next_time, weight = row
        here = latents[carried.astype(int)]
        there, history = solver.step(here, velocity(None, here, time, None), time, next_time, weight, history)
        return (latents.at[carried.astype(int)].set(there), history), None

    latents = jnp.concatenate([x, jnp.zeros_like(x[:1])])
    history = jax.tree.map(lambda h: h + jnp.nan, solver.history(x[:2]))
    (ends, _), _ = jax.jit(lambda *carry: jax.lax.scan(advance, carry, tuple(table.transpose(2, 0, 1))))(
        latents, history
    )
    expected = [walk(solver, velocity, PAPER, start, x[i : i + 1])[0] for i, start in enumerate((4, 9, 12))]
    chex.assert_trees_all_close(ends[:3], jnp.stack(expected), atol=2e-6)


@pytest.mark.parametrize(("make", "key"), [(lambda: Euler(0), "stride"), (lambda: DpmSolver2M(0), "steps")])
def test_senseless_numbers_of_steps_are_refused(make, key):
    with pytest.raises(ConfigError, match=rf"^config.{key}: found 0, expected a whole number from 1"):
        make()


@pytest.mark.parametrize("solver", [Euler(2), DpmSolver2M(4)])
@pytest.mark.parametrize("start", [-1, 17])
def test_starts_outside_the_grid_are_refused(solver, start):
    with pytest.raises(ValueError, match="from 0 to 16"):
        tail_steps(solver, PAPER, start)


def test_2m_needs_a_shifted_grid():
    with pytest.raises(ValueError, match="shifted grid"):
        DpmSolver2M(2).nodes((1.0, 0.9, 0.5, 0.0), 0)
