"""Every process against its published formulas, restated here in NumPy float64."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.flow.process import Cps, DanceSde, ExactByStd, ExactSde, FlowByStd, FlowSde, Ode
from egrpo_jax.flow.transition import Kernel, draw, euler_step, log_prob, over_latents

TIMES = shifted_times(16, 3.0)
X, V, NOISE = np.random.default_rng(0).normal(size=(3, 4, 6, 5)).astype(np.float32)
STEPS = [(0, 1), (1, 1), (3, 2), (7, 3), (14, 1)]
RANDOM = [FlowSde(0.7), DanceSde(0.3), Cps(0.7), ExactSde(0.7), ExactSde(1.5), ExactByStd((0.4,)), FlowByStd((0.4,))]
each_random = pytest.mark.parametrize("process", RANDOM, ids=str)
each_process = pytest.mark.parametrize("process", [*RANDOM, Ode()], ids=str)


def published(process, t, t_next, t_1):
    """The std of a process, and its mean as factors of x and v, in the forms in which the papers' codes have them."""
    span = t - t_next
    if isinstance(process, FlowSde | DanceSde | FlowByStd | Ode):
        remaining = 1 - (t_1 if t == 1 else t)
        levels = {Ode: 0, DanceSde: 0.3, FlowSde: 0.7 * np.sqrt(t / remaining), FlowByStd: 0.4 / np.sqrt(span)}
        g = levels[type(process)]
        return g * np.sqrt(span), 1 - g**2 * span / (2 * t), -span * (1 + g**2 * (1 - t) / (2 * t))
    if isinstance(process, Cps):
        std = t_next * np.sin(0.7 * np.pi / 2)
    elif isinstance(process, ExactSde):
        log_odds = lambda time: np.log(1 - time) - np.log(time)
        decay = np.exp(log_odds(t) - log_odds(t_next)) if t < 1 else 0.0
        std = t_next * np.sqrt(1 - decay ** (process.noise_level**2))
    else:
        std = min(0.4, t_next)
    kept = np.sqrt(max(t_next**2 - std**2, 0))
    return std, 1 - t_next + kept, -(1 - t_next) * t + kept * (1 - t)


def table(process):
    """Times, next times and noises of STEPS."""
    rows = [(TIMES[i], TIMES[i + span], process.noise(TIMES, i, span)) for i, span in STEPS]
    return np.array(rows).T


def formulas(process):
    """`published` of STEPS: std, factor of x, factor of v."""
    return np.array([published(process, TIMES[i], TIMES[i + span], TIMES[1]) for i, span in STEPS]).T


@each_process
def test_std_and_jacobian_on_the_host(process):
    std, _, of_velocity = formulas(process)
    for row, expected_std, expected in zip(table(process).T, std, -of_velocity, strict=True):
        np.testing.assert_allclose(process.std(*row), expected_std, rtol=1e-12)
        np.testing.assert_allclose(process.jacobian(*row), expected, rtol=1e-9)
    np.testing.assert_allclose(process.jacobian(*table(process)), -of_velocity, rtol=1e-9)


@each_process
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, lambda f: jax.vmap(f)], ids=["plain", "jit", "vmap"])
def test_kernel_equals_the_published_form(process, wrap):
    rows = jnp.asarray(table(process), jnp.float32)
    x, v = (np.broadcast_to(value[0], (len(STEPS), 6, 5)) for value in (X, V))
    kernel = wrap(process.kernel)(jnp.asarray(x), jnp.asarray(v), *rows)
    std, of_latents, of_velocity = (value[:, None, None] for value in formulas(process))
    chex.assert_trees_all_close(kernel.mean, (of_latents * x + of_velocity * v).astype(np.float32), atol=3e-6)
    chex.assert_trees_all_close(kernel.std.reshape(-1), std.ravel().astype(np.float32), rtol=2e-6)
    chex.assert_trees_all_close(process.std(*rows), std.ravel().astype(np.float32), rtol=2e-6)


@each_random
def test_log_prob_is_that_of_the_published_gaussian(process):
    for i, span in STEPS:
        noise = np.float32(process.noise(TIMES, i, span))
        kernel = process.kernel(X, V, np.float32(TIMES[i]), np.float32(TIMES[i + span]), noise)
        sample = draw(kernel, NOISE)
        std, of_latents, of_velocity = published(process, TIMES[i], TIMES[i + span], TIMES[1])
        mean = of_latents * X.astype(np.float64) + of_velocity * V
        density = -((sample - mean) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)
        np.testing.assert_allclose(log_prob(kernel, sample), density.mean((1, 2)), atol=2e-5)


@each_process
def test_jacobian_is_the_derivative_of_the_mean(process):
    for row in table(process).T:
        time, next_time, noise = jnp.asarray(row, jnp.float32)
        mean = lambda v: process.kernel(jnp.float32([[0.3, -0.2]]), v, time, next_time, noise).mean
        derivative = jax.jacobian(mean)(jnp.float32([[0.5, 1.5]])).reshape(2, 2)
        expected = -jnp.eye(2) * process.jacobian(time, next_time, noise)
        np.testing.assert_allclose(derivative, expected, rtol=1e-5)
        np.testing.assert_allclose(-derivative[0, 0], process.jacobian(*row), rtol=1e-4)


@each_process
def test_without_noise_it_is_the_odes_step(process):
    for time, next_time in [(1.0, 0.9), (0.9, 0.8), (0.3, 0.0)]:
        time, next_time = np.float32(time), np.float32(next_time)
        kernel = process.kernel(X, V, time, next_time, np.float32(0))
        expected = euler_step(X, V, time, next_time)
        chex.assert_trees_all_close(kernel.mean, expected, atol=1e-6)
        chex.assert_trees_all_close(draw(kernel, NOISE), expected, atol=1e-6)
        np.testing.assert_allclose(process.jacobian(time, next_time, np.float32(0)), time - next_time, rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_flow_sde_is_bit_for_bit_the_kernel_before_there_were_others(wrap):
    def sde_kernel(latents, velocity, time, next_time, sigma):
        time, next_time, sigma = (over_latents(value, latents) for value in (time, next_time, sigma))
        span = time - next_time
        drift = velocity + jnp.square(sigma) / (2 * time) * (latents + (1 - time) * velocity)
        return Kernel(latents - span * drift, sigma * jnp.sqrt(span))

    for i, span in STEPS:
        row = [jnp.full(4, x) for x in (TIMES[i], TIMES[i + span], FlowSde(0.7).noise(TIMES, i, span))]
        chex.assert_trees_all_equal(wrap(FlowSde(0.7).kernel)(X, V, *row), wrap(sde_kernel)(X, V, *row))


def test_flow_sde_at_pure_noise_uses_the_next_time_of_the_grid():
    for span in (1, 5):
        np.testing.assert_allclose(FlowSde(0.7).noise(TIMES, 0, span), 0.7 / np.sqrt(1 - TIMES[1]), rtol=1e-12)
        np.testing.assert_allclose(FlowSde(0.7).noise(TIMES, 4, span), 0.7 * 3.0, rtol=1e-12)  # t = 0.9


@pytest.mark.parametrize("noise_level", [1e-4, 0.7, 1.5, 100.0])
def test_exact_sde_draws_all_noise_afresh_at_pure_noise(noise_level):
    process = ExactSde(noise_level)
    noise = process.noise(TIMES, 0, 3)
    assert noise == TIMES[3]
    kernel = process.kernel(X, V, np.float32(1), np.float32(TIMES[3]), np.float32(noise))
    chex.assert_trees_all_close(kernel.mean, np.float32(1 - TIMES[3]) * (X - V), atol=1e-6)


@pytest.mark.parametrize("process", [Cps(1.0), ExactSde(0.7), ExactByStd((0.4,))], ids=str)
def test_no_noise_reaches_the_end(process):
    """The step to t' = 0 has no noise, and ends at the predicted data."""
    assert process.noise(TIMES, 13, 3) == 0
    kernel = process.kernel(X, V, np.float32(TIMES[13]), np.float32(0), np.float32(0))
    chex.assert_trees_all_close(kernel.mean, X - np.float32(TIMES[13]) * V, atol=1e-6)


@pytest.mark.parametrize("share", [1e-3, 0.1, 0.9, 1 - 1e-3, 1 - 1e-6, 1.0])
def test_float32_keeps_the_noise_level(share):
    """To each std belongs the sqrt(t'^2 - std^2) of just this std, also where it is next to 0 or t'."""
    next_time = jnp.float32(0.9)
    std = jnp.float32(share) * next_time
    kernel = Cps().kernel(jnp.ones((1, 1)), jnp.ones((1, 1)), jnp.float32(1), next_time, std)  # x0 = 0, x1 = 1
    expected = np.sqrt(np.float64(next_time) ** 2 - np.float64(std) ** 2)
    np.testing.assert_allclose(kernel.mean, expected, atol=6e-8)


def test_std_by_choice():
    steps = ExactByStd(tuple(np.linspace(0.9, 0.15, 16).tolist()))
    assert [ExactByStd((0.5,)).noise(TIMES, i, 1) for i in (0, 11, 12)] == [0.5, 0.5, TIMES[13]]
    assert [steps.noise(TIMES, i, 1) for i in (0, 14)] == [0.9, TIMES[15]]
    np.testing.assert_allclose(steps.noise(TIMES, 4, 3), 0.7)


def test_any_std_is_a_step_of_flow_sde_of_some_level():
    for step in range(1, 15):
        time, next_time, noise = TIMES[step], TIMES[step + 1], FlowByStd((0.4,)).noise(TIMES, step, 1)
        level = 0.4 / np.sqrt(time / (1 - time) * (time - next_time))
        np.testing.assert_allclose(FlowSde(level).noise(TIMES, step, 1), noise, rtol=1e-12)


def test_schedules_that_move_compile_once():
    traces = []

    @jax.jit
    def mean(time, next_time, noise):
        traces.append(1)
        return FlowSde().kernel(X, V, time, next_time, noise).mean

    for step in range(4):
        noises = [FlowSde().noise(TIMES, i, 1) * (i >= step) for i in range(4)]
        mean(*(np.array(column, np.float32) for column in (TIMES[:4], TIMES[1:5], noises)))
    assert len(traces) == 1


@each_process
def test_bfloat16_and_other_shapes_are_refused(process):
    with pytest.raises(AssertionError):
        process.kernel(jnp.asarray(X, jnp.bfloat16), jnp.asarray(V, jnp.bfloat16), 0.9, 0.8, 0.1)
    with pytest.raises(AssertionError):
        process.kernel(X, V[:1], 0.9, 0.8, 0.1)


@each_process
@pytest.mark.parametrize(("step", "span"), [(16, 1), (14, 3), (-1, 1), (3, 0)])
def test_steps_outside_the_grid_are_refused(process, step, span):
    with pytest.raises(ValueError, match="leaves the grid"):
        process.noise(TIMES, step, span)


@pytest.mark.parametrize("process", [FlowSde, DanceSde, Cps, ExactSde])
@pytest.mark.parametrize("noise_level", [0.0, -0.7, float("nan"), 1e9])
def test_senseless_noise_levels_are_refused(process, noise_level):
    with pytest.raises(ConfigError, match=r"^config.noise_level: found"):
        process(noise_level)


def test_more_than_all_noise_is_refused():
    with pytest.raises(ConfigError, match=r"found 1.5, expected a number from 0.0001 to 1"):
        Cps(1.5)


@pytest.mark.parametrize("stds", [(), (0.0,), (0.4, float("nan"))])
def test_senseless_stds_are_refused(stds):
    for process in (ExactByStd, FlowByStd):
        with pytest.raises(ConfigError, match=r"^config.stds"):
            process(stds)


@pytest.mark.parametrize("process", [ExactByStd, FlowByStd])
def test_stds_of_another_grid_are_refused(process):
    with pytest.raises(ConfigError, match=r"each of the grid's 16 steps"):
        process((0.4, 0.3)).noise(TIMES, 0, 1)


def test_processes_are_values():
    assert FlowSde(0.7) == FlowSde() != DanceSde(0.7)
    assert len({FlowSde(), FlowSde(0.7), dataclasses.replace(FlowSde(), noise_level=0.9)}) == 2
