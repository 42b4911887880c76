"""The noise level and the marginals that each process keeps, against numbers computed apart from this code.

T = 16, s = 3, a = eta = 0.7; merges are those of E-GRPO's threshold 2.2.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.flow.process import Cps, DanceSde, ExactByStd, ExactSde, FlowByStd, FlowSde, Ode
from egrpo_jax.flow.transition import draw
from tests.flow.gaussians import factor_and_std, mixture_velocity, variance_at

TIMES = shifted_times(16, 3.0)
MERGED = [1, 1, 2, 2, 2, 3, 3, 3]
SINGLE_STEPS = [  # t', Euler: std, n/t', J/std; exact: r, std, J/std
    (0.9783, 0.7000, 1.0363, 0.0311, 0.0000, 0.9783, 0.0222),
    (0.9545, 0.7231, 1.0451, 0.0408, 0.4667, 0.5329, 0.0511),
    (0.9286, 0.5170, 1.0155, 0.0626, 0.6190, 0.4249, 0.0721),
    (0.9000, 0.4266, 1.0093, 0.0834, 0.6923, 0.3655, 0.0933),
    (0.8684, 0.3732, 1.0072, 0.1054, 0.7333, 0.3261, 0.1163),
    (0.8333, 0.3369, 1.0064, 0.1297, 0.7576, 0.2972, 0.1423),
    (0.7941, 0.3100, 1.0062, 0.1575, 0.7714, 0.2744, 0.1726),
    (0.7500, 0.2888, 1.0065, 0.1902, 0.7778, 0.2553, 0.2089),
]
MERGED_STEPS = [
    *SINGLE_STEPS[:2],
    (0.9000, 0.7492, 1.0707, 0.0906, 0.4286, 0.5246, 0.1186),
    (0.8684, 0.6190, 1.0437, 0.1210, 0.5077, 0.4617, 0.1508),
    (0.8333, 0.5422, 1.0343, 0.1531, 0.5556, 0.4169, 0.1867),
    (0.7500, 0.6188, 1.0859, 0.2382, 0.4545, 0.4246, 0.3197),
    (0.7000, 0.5715, 1.0886, 0.2904, 0.4667, 0.3908, 0.3921),
    (0.6429, 0.5347, 1.1001, 0.3522, 0.4667, 0.3589, 0.4843),
]
ROWS = [(i, 1, row) for i, row in enumerate(SINGLE_STEPS)]
ROWS += [(i, merge, row) for i, (merge, row) in enumerate(zip(MERGED, MERGED_STEPS, strict=True))]


def row_of(process, step, span, times=TIMES):
    return times[step], times[step + span], process.noise(times, step, span)


def kappa(process, step, span):
    """J / std."""
    row = row_of(process, step, span)
    return process.jacobian(*row) / process.std(*row)


def noise_level(process, step, span):
    """n/t' after a step from x = (1 - t) m + t e, for data in two narrow modes m, from the kernel itself."""
    time, next_time, noise = jnp.asarray(row_of(process, step, span), jnp.float32)
    e = jnp.float32([[[-1.0, 1.0]]])
    latents = (1 - time) * 200 + time * e
    velocity = mixture_velocity([-200.0, 200.0], 1e-6)(None, latents, time[None], None)
    kernel = process.kernel(latents, velocity, time, next_time, noise)
    kept = np.diff(kernel.mean)[0, 0, 0] / 2
    return np.hypot(kept, kernel.std.item()) / next_time


@pytest.mark.parametrize(("step", "span", "row"), ROWS)
def test_table_of_steps(step, span, row):
    next_time, euler_std, level, euler_kappa, ratio, exact_std, exact_kappa = row
    time, found, sigma = row_of(FlowSde(0.7), step, span)
    exact = row_of(ExactSde(0.7), step, span)
    close = lambda value, expected: np.testing.assert_allclose(value, expected, atol=5.1e-5)
    close(found, next_time)
    close(FlowSde(0.7).std(time, found, sigma), euler_std)
    close(kappa(FlowSde(0.7), step, span), euler_kappa)
    close(noise_level(FlowSde(0.7), step, span), level)
    close(found * (1 - time) / (time * (1 - found)), ratio)
    close(ExactSde(0.7).std(*exact), exact_std)
    close(kappa(ExactSde(0.7), step, span), exact_kappa)


@pytest.mark.parametrize("process", [ExactSde(0.7), ExactSde(1.5), Cps(0.7), ExactByStd((0.5,)), Ode()], ids=str)
def test_noise_level_is_exact_for_any_step(process):
    levels = [noise_level(process, i, span) for i, span, _ in ROWS]
    np.testing.assert_allclose(levels, 1, atol=2e-5)


def test_euler_steps_add_what_the_docstring_says():
    for i, span, _ in ROWS:
        t, t_next, g = row_of(FlowSde(0.7), i, span)
        excess = (g * (t - t_next)) ** 2 * (1 + (g / 2) ** 2 / t) / t
        np.testing.assert_allclose((noise_level(FlowSde(0.7), i, span) * t_next) ** 2 - t_next**2, excess, atol=1e-5)


def test_a_chosen_std_of_eulers_kernel_adds_too_much_noise():
    for step in range(1, 15):
        time, next_time, _ = row_of(FlowByStd((0.4,)), step, 1)
        excess = 0.4**2 * (time - next_time + 0.4**2 / (4 * time)) / time
        found = (noise_level(FlowByStd((0.4,)), step, 1) * next_time) ** 2 - next_time**2
        np.testing.assert_allclose(found, excess, atol=1e-5)


@pytest.mark.parametrize(
    ("process", "merges", "expected"),
    [
        (FlowSde(0.7), [1] * 8, ".31 .41 .63 .83 1.05 1.30 1.57 1.90"),
        (FlowSde(0.7), MERGED, ".19 .25 .55 .73 .93 1.45 1.76 2.14"),
        (ExactSde(0.7), MERGED, ".10 .24 .55 .70 .87 1.48 1.82 2.25"),
        (ExactByStd((0.4,)), [1] * 8, ".53 .63 .73 .86 1.01 1.18 1.40 1.66"),
    ],
    ids=["single", "merged", "exact", "by_std"],
)
def test_relative_weights_of_the_steps(process, merges, expected):
    kappas = np.array([kappa(process, i, span) for i, span in enumerate(merges)])
    np.testing.assert_allclose(kappas / kappas.mean(), [float(x) for x in expected.split()], atol=5.1e-3)


@pytest.mark.parametrize(
    ("std", "etas"),
    [(0.5323, ".699 .911 1.082 1.232 1.374 1.516 1.670"), (0.4, ".503 .654 .774 .877 .971 1.062 1.154")],
)
def test_a_chosen_std_is_a_step_of_the_exact_sde(std, etas):
    for step, eta in enumerate(map(float, etas.split()), start=1):
        time, next_time, noise = row_of(ExactByStd((std,)), step, 1)
        ratio = next_time * (1 - time) / (time * (1 - next_time))
        found = np.sqrt(np.log(1 - (noise / next_time) ** 2) / np.log(ratio))
        np.testing.assert_allclose(found, eta, atol=6e-4)
        np.testing.assert_allclose(ExactSde(found).noise(TIMES, step, 1), std, rtol=1e-9)


def test_small_steps_of_exact_and_flow_sde_agree():
    for span, expected in [(0.1, 0.690), (0.01, 0.956), (0.001, 0.9953), (0.0001, 0.9995)]:
        times = (1.0, 0.9, 0.9 - span, 0.0)
        exact, euler = row_of(ExactSde(0.7), 1, 1, times), row_of(FlowSde(0.7), 1, 1, times)
        ratio = ExactSde(0.7).std(*exact) / FlowSde(0.7).std(*euler)
        np.testing.assert_allclose(ratio, expected, atol=5.1e-4 if span > 0.005 else 5.1e-5)


@pytest.mark.parametrize(
    ("process", "errors"),
    [
        (FlowSde(0.7), "+.138 +.079 +.056 +.116 +.091 +.063"),
        (ExactSde(0.7), "-.005 -.007 -.010 -.038 -.056 -.083"),
    ],
    ids=str,
)
def test_error_of_the_marginal_after_a_merged_step(process, errors):
    spans = [(i, MERGED[i]) for i in range(2, 8)]
    factor, std = factor_and_std(process, TIMES, spans)
    before = np.array([variance_at(TIMES[i], 1.0) for i, _ in spans])
    after = np.array([variance_at(TIMES[i + span], 1.0) for i, span in spans])
    found = (factor**2 * before + std**2) / after - 1
    np.testing.assert_allclose(found, [float(x) for x in errors.split()], atol=6e-4)


def chain_variance(process, num_steps):
    """The variance in which a chain of single random steps ends, for data N(0, 1)."""
    factor, std = factor_and_std(process, shifted_times(num_steps, 3.0), [(i, 1) for i in range(num_steps)])
    variance = 1.0
    for scale, deviation in zip(factor, std, strict=True):
        variance = scale**2 * variance + deviation**2
    return variance


@pytest.mark.parametrize(
    ("process", "variances"),
    [
        (FlowSde(0.7), (0.8742, 0.9976, 1.0016)),
        (DanceSde(0.3), (0.8035, 0.9865, 0.9983)),
        (ExactSde(0.7), (0.7589, 0.9815, 0.9976)),
        (ExactSde(1.5), (0.6447, 0.9633, 0.9951)),
        (Ode(), (0.7969, 0.9860, 0.9982)),
        (Cps(0.7), (0.5767, 0.7066, 0.7222)),
    ],
    ids=str,
)
def test_chains_of_small_steps_reach_the_datas_variance_but_for_cps(process, variances):
    found = [chain_variance(process, num_steps) for num_steps in (16, 256, 2048)]
    np.testing.assert_allclose(found, variances, atol=2e-4)
    assert (abs(found[-1] - 1) < 0.01) != isinstance(process, Cps)


@pytest.mark.parametrize("process", [FlowSde(0.7), ExactSde(0.7)], ids=str)
def test_a_long_random_chain_draws_from_a_mixture(process):
    """Two modes at -1 and 1 of width .1: their shares and variance, by 8192 samples, whose errors are .2 and .8 %."""
    times = shifted_times(2048, 3.0)
    rows = np.array([row_of(process, i, 1, times) for i in range(2048)], np.float32)
    velocity = mixture_velocity([-1.0, 1.0], 0.1)
    start_key, key = jax.random.split(jax.random.key(0))

    def step(x, row):
        (time, next_time, noise), index = row
        kernel = process.kernel(x, velocity(None, x, time[None], None), time, next_time, noise)
        return draw(kernel, jax.random.normal(jax.random.fold_in(key, index), x.shape)), None

    start = jax.random.normal(start_key, (1, 64, 128))
    x = jax.jit(lambda x: jax.lax.scan(step, x, (tuple(rows.T), np.arange(2048)))[0])(start)
    np.testing.assert_allclose(jnp.var(x), 1 + 0.1**2, rtol=0.01)
    np.testing.assert_allclose(jnp.std(jnp.abs(x)), 0.1, rtol=0.03)
    np.testing.assert_allclose((x > 0).mean(), 0.5, atol=0.0166)  # three standard errors
