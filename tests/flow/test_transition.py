"""The transition against its formulas, restated here in NumPy float64."""

import chex
import jax.numpy as jnp
import numpy as np

from egrpo_jax.flow.transition import Kernel, draw, euler_step, log_prob

X, V, NOISE = np.random.default_rng(0).normal(size=(3, 4, 6, 5)).astype(np.float32)
STD = np.array([0.1, 0.5, 1.0, 3.0], np.float32)[:, None, None]


class TransitionTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_euler_step(self):
        time, next_time = np.array([1.0, 0.9, 0.5, 0.1], np.float32), np.array([0.9, 0.3, 0.4, 0.0], np.float32)
        expected = X - (time - next_time)[:, None, None] * V
        chex.assert_trees_all_close(self.variant(euler_step)(X, V, time, next_time), expected, atol=1e-6)

    @chex.all_variants(with_pmap=False)
    def test_a_sample_is_mean_and_noise(self):
        chex.assert_trees_all_close(self.variant(draw)(Kernel(X, STD), NOISE), X + STD * NOISE, rtol=1e-6)

    @chex.all_variants(with_pmap=False)
    def test_log_prob_is_the_mean_gaussian_density(self):
        kernel = Kernel(jnp.asarray(X), jnp.asarray(STD))
        sample, mean, std = (np.asarray(x, np.float64) for x in (draw(kernel, NOISE), X, STD))
        density = -((sample - mean) ** 2) / (2 * std**2) - np.log(std) - 0.5 * np.log(2 * np.pi)
        scored = self.variant(log_prob)(kernel, draw(kernel, NOISE))
        chex.assert_trees_all_close(scored, density.mean((1, 2)).astype(np.float32), rtol=1e-5)
