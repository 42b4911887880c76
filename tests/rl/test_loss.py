"""The losses, worked out by hand."""

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.rl.loss import clipped_ratio_loss, kl_masked_loss, total_loss

RATIO = jnp.array([1.5, 1.5, 0.5, 0.5])
ADVANTAGE = jnp.array([2.0, -2.0, 2.0, -2.0])


def clipped(ratio, clip_range, **weights):
    return total_loss(clipped_ratio_loss(ratio, ADVANTAGE, clip_range), ratio, jnp.log(ratio), **weights)


class LossTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_values_by_hand(self):
        loss, stats = self.variant(lambda ratio: clipped(ratio, 0.2))(RATIO)
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
        grad = self.variant(jax.grad(lambda log_ratio: clipped(jnp.exp(log_ratio), 0.2)[0]))(jnp.log(RATIO))
        chex.assert_trees_all_close(grad, jnp.array([0.0, 2 * 1.5, -2 * 0.5, 0.0]) / 4, rtol=1e-6)

    @chex.all_variants(with_pmap=False)
    def test_on_policy_gradient_is_minus_the_advantage(self):
        grad = self.variant(jax.grad(lambda log_ratio: clipped(jnp.exp(log_ratio), 1e-4)[0]))(jnp.zeros(4))
        chex.assert_trees_all_close(grad, -ADVANTAGE / 4)

    @chex.all_variants(with_pmap=False)
    def test_the_mask_drops_what_goes_on_leaving_a_policy_that_is_too_far(self):
        kl = jnp.array([[0.9e-5], [1e-5]])  # of two states, four samples each
        ratio, advantage = jnp.stack([RATIO, RATIO]), jnp.stack([ADVANTAGE, ADVANTAGE])
        samples = self.variant(lambda ratio: kl_masked_loss(ratio, advantage, kl, 1e-5))(ratio)
        chex.assert_trees_all_close(samples.loss, jnp.array([[-3.0, 3.0, -1.0, 1.0], [0.0, 3.0, -1.0, 0.0]]))
        chex.assert_trees_all_equal(samples.cut_high, jnp.array([[False] * 4, [True, False, False, False]]))
        chex.assert_trees_all_equal(samples.cut_low, jnp.array([[False] * 4, [False, False, False, True]]))

    @chex.all_variants(with_pmap=False)
    def test_the_mask_leaves_the_ratio_its_gradient_and_has_none_itself(self):
        masked = lambda ratio, kl: kl_masked_loss(ratio, ADVANTAGE, kl, 1e-5).loss.sum()
        of_ratio, of_kl = self.variant(jax.grad(masked, (0, 1)))(RATIO, jnp.array(1e-4))
        chex.assert_trees_all_close(of_ratio, jnp.array([0.0, 2.0, -2.0, 0.0]))
        chex.assert_trees_all_close(of_kl, jnp.array(0.0))

    @chex.all_variants(with_pmap=False)
    def test_a_ratio_of_one_is_never_dropped(self):
        samples = self.variant(lambda ratio: kl_masked_loss(ratio, ADVANTAGE, jnp.array(1.0), 1e-5))(jnp.ones(4))
        chex.assert_trees_all_close(samples.loss, -ADVANTAGE)

    @chex.all_variants(with_pmap=False)
    def test_weights_of_steps_are_of_the_loss_alone(self):
        weight, of_steps = jnp.array([0.5, 0.25, 0.25, 0.0]), jnp.array([1.0, 2.0, 3.0, jnp.nan])
        loss, stats = self.variant(lambda ratio: clipped(ratio, 0.2, weight=weight, step_weight=of_steps))(RATIO)
        chex.assert_trees_all_close(loss, jnp.array(0.5 * -2.4 + 0.25 * 2 * 3.0 + 0.25 * 3 * -1.0), rtol=1e-6)
        chex.assert_trees_all_close(stats.ratio_excess, 0.25, rtol=1e-6)
        chex.assert_trees_all_close((stats.clip_high, stats.clip_low), (0.5, 0.0))
