"""The clipped loss, worked out by hand."""

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.rl.loss import clipped_ratio_loss

OLD = jnp.array([-1.0, -1.0, -1.0, -1.0])
RATIO = jnp.array([1.5, 1.5, 0.5, 0.5])
NEW = OLD + jnp.log(RATIO)
ADVANTAGE = jnp.array([2.0, -2.0, 2.0, -2.0])


class LossTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_values_by_hand(self):
        loss, stats = self.variant(clipped_ratio_loss)(NEW, OLD, ADVANTAGE, 0.2, 5.0)
        # -2 * 1.2 (clipped), 2 * 1.5 (not), -2 * 0.5 (not), 2 * 0.8 (clipped)
        chex.assert_trees_all_close(loss, jnp.array((-2.4 + 3.0 - 1.0 + 1.6) / 4), rtol=1e-6)
        chex.assert_trees_all_close(stats.loss, loss)
        chex.assert_trees_all_close(stats.ratio_excess, 0.0, atol=1e-6)
        chex.assert_trees_all_close(stats.ratio_deviation, 0.5, rtol=1e-6)
        chex.assert_trees_all_close(stats.clip_high, 0.25)
        chex.assert_trees_all_close(stats.clip_low, 0.25)
        expected_kl = (2 * (0.5 - jnp.log(1.5)) + 2 * (-0.5 - jnp.log(0.5))) / 4
        chex.assert_trees_all_close(stats.kl, expected_kl, rtol=1e-5)

    @chex.all_variants(with_pmap=False)
    def test_the_clip_cuts_off_the_gradient_of_two_samples(self):
        grad = self.variant(jax.grad(lambda new: clipped_ratio_loss(new, OLD, ADVANTAGE, 0.2, 5.0)[0]))(NEW)
        chex.assert_trees_all_close(grad, jnp.array([0.0, 2 * 1.5, -2 * 0.5, 0.0]) / 4, rtol=1e-6)

    @chex.all_variants(with_pmap=False)
    def test_on_policy_gradient_is_minus_the_advantage(self):
        grad = self.variant(jax.grad(lambda new: clipped_ratio_loss(new, OLD, ADVANTAGE, 1e-4, 5.0)[0]))(OLD)
        chex.assert_trees_all_close(grad, -ADVANTAGE / 4)

    @chex.all_variants(with_pmap=False)
    def test_advantages_are_clipped(self):
        loss, _ = self.variant(clipped_ratio_loss)(OLD, OLD, jnp.array([50.0, 0.0, 0.0, 0.0]), 0.2, 5.0)
        chex.assert_trees_all_close(loss, -5.0 / 4)
