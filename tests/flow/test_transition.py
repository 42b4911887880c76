"""The transition against its formulas, restated here in NumPy float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.flow.entropy import sigma
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.flow.transition import draw, euler_step, log_prob, sde_kernel

TIMES = shifted_times(16, 3.0)
X, V, NOISE = np.random.default_rng(0).normal(size=(3, 4, 6, 5)).astype(np.float32)


def mean_and_std(x, v, t, t_next, s):
    """The second form in which the transition is published."""
    span = t - t_next
    mean = x * (1 - s**2 * span / (2 * t)) - span * v * (1 + s**2 * (1 - t) / (2 * t))
    return mean, s * np.sqrt(span)


class TransitionTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_kernel_equals_the_published_form(self):
        for step, merge in [(0, 1), (3, 2), (7, 3), (15, 1)]:
            t, t_next, s = TIMES[step], TIMES[step + merge], sigma(TIMES, step, 0.7)
            kernel = self.variant(sde_kernel)(X, V, jnp.full(4, t), jnp.full(4, t_next), jnp.full(4, s))
            mean, std = mean_and_std(X.astype(np.float64), V, t, t_next, s)
            chex.assert_trees_all_close(kernel.mean, mean.astype(np.float32), atol=2e-6)
            chex.assert_trees_all_close(kernel.std, np.full((4, 1, 1), std, np.float32), rtol=1e-6)

    @chex.all_variants(with_pmap=False)
    def test_zero_noise_is_the_euler_step(self):
        kernel = self.variant(sde_kernel)(X, V, jnp.float32(0.9), jnp.float32(0.8), jnp.float32(0.0))
        chex.assert_trees_all_close(kernel.mean, X - np.float32(0.1) * V, atol=1e-6)
        chex.assert_trees_all_close(draw(kernel, NOISE), euler_step(X, V, 0.9, 0.8), atol=1e-6)

    @chex.all_variants(with_pmap=False)
    def test_log_prob_is_the_mean_gaussian_density(self):
        kernel = sde_kernel(X, V, jnp.float32(0.9), jnp.float32(0.8), jnp.float32(2.1))
        sample = draw(kernel, NOISE)
        mean, std = mean_and_std(X.astype(np.float64), V, 0.9, 0.8, 2.1)
        density = -((sample - mean) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)
        chex.assert_trees_all_close(
            self.variant(log_prob)(kernel, sample), density.mean((1, 2)).astype(np.float32), rtol=1e-5
        )


def test_the_sde_keeps_the_marginals_of_the_flow():
    """For data N(0, 1) the true velocity is linear and x_t has variance (1-t)^2 + t^2; a fine SDE step must keep it."""
    t, t_next, a = 0.7, 0.699, 0.7
    variance = (1 - t) ** 2 + t**2
    x = np.sqrt(variance) * jax.random.normal(jax.random.key(1), (400, 1000))
    velocity = (t - (1 - t)) / variance * x  # E[noise - data | x]
    kernel = sde_kernel(x, velocity, jnp.float32(t), jnp.float32(t_next), jnp.float32(a * np.sqrt(t / (1 - t))))
    sample = draw(kernel, jax.random.normal(jax.random.key(2), x.shape))
    expected = (1 - t_next) ** 2 + t_next**2
    # Change of variance in one step is 8e-4; the estimate's standard error is 1.3e-3, paired with x far less.
    change = float(jnp.var(sample) - jnp.var(x))
    assert abs(change - (expected - variance)) < 3e-4


def test_bfloat16_is_refused():
    with pytest.raises(AssertionError):
        sde_kernel(jnp.asarray(X, jnp.bfloat16), jnp.asarray(V, jnp.bfloat16), 0.9, 0.8, 1.0)
