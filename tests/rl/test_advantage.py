"""Advantages, worked out by hand."""

import chex
import jax.numpy as jnp
import numpy as np

from egrpo_jax.rl.advantage import credit, group_advantage, zero_spread_share


class AdvantageTest(chex.TestCase):
    @chex.all_variants(with_pmap=False)
    def test_two_groups_by_hand(self):
        rewards = jnp.array([[1.0, 2.0, 3.0], [10.0, 10.0, 16.0]])
        # Sample stds: 1 and sqrt(12).
        expected = jnp.array([[-1.0, 0.0, 1.0], [-2 / 12**0.5, -2 / 12**0.5, 4 / 12**0.5]])
        chex.assert_trees_all_close(self.variant(group_advantage)(rewards), expected, rtol=1e-6)

    @chex.all_variants(with_pmap=False)
    def test_equal_rewards_have_no_advantage(self):
        # Twelve times 0.3 in float32: the computed mean is not exactly 0.3.
        rewards = jnp.stack([jnp.full(12, 0.3), jnp.full(12, -1.7), jnp.full(12, 1e-20)])
        chex.assert_trees_all_equal(self.variant(group_advantage)(rewards), jnp.zeros_like(rewards))


def test_a_reward_that_is_nan_shows():
    advantage = group_advantage(jnp.array([[1.0, jnp.nan, 2.0], [1.0, 2.0, 3.0]]))
    assert jnp.isnan(advantage[0]).all()
    assert jnp.isfinite(advantage[1]).all()


def test_credit_normalises_each_reward_before_weighting():
    rng = np.random.default_rng(0)
    small, large = rng.normal(size=(2, 3, 4, 2, 5)).astype(np.float32)  # [P, E, R, G]
    rewards = {"small": jnp.array(small), "large": jnp.array(100 * large + 7), "heldout": jnp.array(large)}
    got = credit(rewards, {"small": 0.7, "large": 0.3})

    expected = np.zeros((4, 3, 5))
    for weight, reward in ((0.7, small), (0.3, large)):
        for stride in range(2):
            r = reward[:, :, stride].astype(np.float64)
            normal = (r - r.mean(-1, keepdims=True)) / r.std(-1, ddof=1, keepdims=True)
            expected += weight * normal.swapaxes(0, 1)
    chex.assert_trees_all_close(got, expected.astype(np.float32), atol=2e-4)


def test_groups_are_not_mixed():
    """Shifting the rewards of one active step of one prompt changes no advantage."""
    rewards = jnp.array(np.random.default_rng(1).normal(size=(3, 4, 1, 5)), jnp.float32)
    shifted = rewards.at[1, 2].add(3.0)
    chex.assert_trees_all_close(credit({"r": rewards}, {"r": 1.0}), credit({"r": shifted}, {"r": 1.0}), atol=1e-5)


def test_share_of_groups_without_spread():
    rewards = jnp.array([[1.0, 1.0], [1.0, 2.0], [0.3, 0.3], [0.0, -1.0]])
    assert zero_spread_share(rewards) == 0.5
