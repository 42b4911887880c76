"""Advantages, worked out by hand."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.rl.advantage import (
    Credit,
    complete_groups,
    group_advantage,
    running_advantage,
    trimmed,
    zero_spread_share,
)
from egrpo_jax.rl.advantage import credit as credit_of


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


def credit(rewards, weights, combination="advantages", clips=None, came=None, **how):
    came = jnp.ones(next(iter(rewards.values())).shape, bool) if came is None else came
    return credit_of(rewards, came, weights, clips, Credit(combination, **how))


def test_credit_normalises_each_reward_before_weighting():
    rng = np.random.default_rng(0)
    small, large = rng.normal(size=(2, 3, 4, 2, 5)).astype(np.float32)  # [P, E, R, G]
    rewards = {"small": jnp.array(small), "large": jnp.array(100 * large + 7), "heldout": jnp.array(large)}
    got = credit(rewards, {"small": 0.7, "large": 0.3})

    expected = np.zeros((3, 4, 5))
    for weight, reward in ((0.7, small), (0.3, large)):
        for stride in range(2):
            r = reward[:, :, stride].astype(np.float64)
            normal = (r - r.mean(-1, keepdims=True)) / r.std(-1, ddof=1, keepdims=True)
            expected += weight * normal
    chex.assert_trees_all_close(got, expected.astype(np.float32), atol=2e-4)


def test_groups_are_not_mixed():
    """Shifting the rewards of one active step of one prompt changes no advantage."""
    rewards = jnp.array(np.random.default_rng(1).normal(size=(3, 4, 1, 5)), jnp.float32)
    shifted = rewards.at[1, 2].add(3.0)
    chex.assert_trees_all_close(credit({"r": rewards}, {"r": 1.0}), credit({"r": shifted}, {"r": 1.0}), atol=1e-5)


@pytest.mark.parametrize("std_of", ["group", "prompt", "all"])
@pytest.mark.parametrize("mean_of", ["group", "prompt", "all"])
def test_means_and_stds_of_wider_sets(mean_of, std_of):
    """Restated, with a group that lacks a score: it counts in no set and has advantage 0."""
    rewards = np.random.default_rng(2).normal(size=(3, 4, 2, 5)).astype(np.float32)
    came = np.ones(rewards.shape, bool)
    came[1, 2, 0, 3] = False
    rewards[1, 2, 0, 3] = 1e6
    got = credit({"r": jnp.array(rewards)}, {"r": 1.0}, came=jnp.array(came), mean_of=mean_of, std_of=std_of)
    left_out = np.zeros((3, 4), bool)
    left_out[1, 2] = True

    def members(of, p, e, r):
        prompts, steps = (
            (slice(None) if of == "all" else slice(p, p + 1)),
            (slice(e, e + 1) if of == "group" else slice(None)),
        )
        return rewards[prompts, steps, r][~left_out[prompts, steps]].astype(np.float64)

    for p, e in np.argwhere(~left_out):
        parts = [
            (rewards[p, e, r] - members(mean_of, p, e, r).mean()) / members(std_of, p, e, r).std(ddof=1) for r in (0, 1)
        ]
        np.testing.assert_allclose(got[p, e], sum(parts), atol=2e-5)
    np.testing.assert_array_equal(got[1, 2], 0)


def test_equal_rewards_of_a_wider_set_have_no_advantage():
    rewards = jnp.full((2, 3, 1, 4), 0.3).at[0, 1, 0, 2].set(0.8)
    got = credit({"r": rewards}, {"r": 1.0})
    assert (np.asarray(got) != 0).any(-1).tolist() == [[False, True, False], [False] * 3]
    wide = credit({"r": rewards}, {"r": 1.0}, mean_of="prompt", std_of="prompt")
    assert (np.asarray(wide) != 0).any(-1).tolist() == [[True] * 3, [False] * 3]


def test_a_sample_gains_by_its_prompt_doing_better_than_others():
    """By hand: all have mean 1 and std 4 / sqrt(7), the second group has mean 2 and std sqrt(8 / 3)."""
    rewards = jnp.array([[[[0.0, 0, 0, 0]]], [[[0, 4, 2, 2]]]])  # [P, E, R, G]
    z = (np.array([[0, 0, 0, 0], [0, 4, 2, 2]]) - 1) / np.sqrt(16 / 7)
    relative = np.array([[0, 0, 0, 0], [-2, 2, 0, 0]]) / np.sqrt(8 / 3)
    np.testing.assert_allclose(credit({"r": rewards}, {"r": 1.0}, absolute=0.5)[:, 0], relative + 0.5 * z, rtol=1e-6)
    np.testing.assert_allclose(z[:, 2], [-0.66144, 0.66144], atol=1e-5)
    equal = jnp.full((2, 3, 1, 12), 0.3)  # whose computed mean is not exactly 0.3
    np.testing.assert_array_equal(credit({"r": equal}, {"r": 1.0}, absolute=1000.0), np.zeros((2, 3, 12)))


@pytest.mark.parametrize("combination", ["advantages", "sum", "decoupled"])
def test_the_absolute_term_restated(combination):
    """Of each reward, or of their sum, over the groups that have all scores, each tail stride by itself."""
    rng = np.random.default_rng(6)
    rewards = {name: rng.normal(i, 1 + i, (3, 2, 2, 5)).astype(np.float32) for i, name in enumerate("ab")}
    came = np.ones((3, 2, 2, 5), bool)
    came[1, 0, 1, 2], rewards["a"][1, 0, 1, 2] = False, 1e9
    weights, judged = {"a": 1.0, "b": -0.5}, np.array([[1, 1], [0, 1], [1, 1]], bool)
    got = credit({k: jnp.array(v) for k, v in rewards.items()}, weights, combination, came=came, absolute=0.7)

    def normalised(r):
        r = r[judged].astype(np.float64)  # [groups, R, G]
        relative = (r - r.mean(-1, keepdims=True)) / r.std(-1, ddof=1, keepdims=True)
        return relative + 0.7 * (r - r.mean((0, 2), keepdims=True)) / r.std((0, 2), ddof=1, keepdims=True)

    parts = {name: weight * rewards[name] for name, weight in weights.items()}
    each = {name: weight * normalised(rewards[name]) for name, weight in weights.items()}
    expected = (normalised(parts["a"] + parts["b"]) if combination == "sum" else each["a"] + each["b"]).sum(1)
    if combination == "decoupled":
        expected = (expected - expected.mean()) / expected.std(ddof=1)
    np.testing.assert_allclose(got[judged], expected, atol=2e-5)
    np.testing.assert_array_equal(got[1, 0], 0)


def test_a_clip_is_of_both_terms_together():
    rewards = {"r": jnp.array([[[[0.0, 0, 0, 0]]], [[[0, 4, 2, 2]]]])}
    free, clipped = (
        credit(rewards, {"r": 1.0}, absolute=0.5),
        credit(rewards, {"r": 1.0}, clips={"r": 1.3}, absolute=0.5),
    )
    assert free.max() > 2.0
    np.testing.assert_array_equal(clipped, free.clip(-1.3, 1.3))


def test_only_the_best_and_the_worst_of_a_group_train():
    """By hand: 4 of 6 weigh 6/4 as much; the mean over the group is that over the four as they were."""
    rewards = jnp.array([[[[5.0, 1, 2, 9, 4, 3]], [[1, 0, 1, 0, 1, 1]]]])  # [P=1, E=2, R=1, G=6]
    all_of_them = np.asarray(credit({"r": rewards}, {"r": 1.0}))
    got = np.asarray(credit({"r": rewards}, {"r": 1.0}, best_of=4))
    # Of the four equal ones of the second group the last two are the highest: that order decides.
    kept = np.array([[[1, 1, 1, 1, 0, 0], [0, 1, 0, 1, 1, 1]]], bool)
    np.testing.assert_array_equal(got != 0, kept)
    np.testing.assert_allclose(got, np.where(kept, 1.5 * all_of_them, 0), rtol=1e-6)
    np.testing.assert_allclose(got[0, 0], 1.5 * np.array([1.0, -3, -2, 5, 0, 0]) / 8**0.5, rtol=1e-6)
    np.testing.assert_allclose(got[0].mean(-1), [all_of_them[0, e, kept[0, e]].mean() for e in (0, 1)], rtol=1e-5)


@pytest.mark.parametrize("combination", ["advantages", "sum", "decoupled"])
def test_the_best_and_the_worst_restated_after_everything_else(combination):
    rng = np.random.default_rng(7)
    rewards = {name: jnp.array(rng.normal(size=(3, 2, 2, 8)), jnp.float32) for name in "ab"}
    came = jnp.ones((3, 2, 2, 8), bool).at[0, 1, 0, 7].set(False)
    others = {"came": came, "trim": 0.25, "absolute": 0.5}
    full = np.asarray(credit(rewards, {"a": 1.0, "b": 2.0}, combination, **others))
    got = np.asarray(credit(rewards, {"a": 1.0, "b": 2.0}, combination, best_of=2, **others))
    expected = np.zeros_like(full)
    for p, e in np.ndindex(3, 2):
        ends = [full[p, e].argmax(), full[p, e].argmin()]
        expected[p, e, ends] = 4 * full[p, e, ends]
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got[0, 1], 0)


def test_the_best_of_all_are_all_and_equal_ones_teach_nothing():
    rewards = {"r": jnp.array(np.random.default_rng(8).normal(size=(3, 2, 1, 6)), jnp.float32)}
    np.testing.assert_array_equal(credit(rewards, {"r": 1.0}, best_of=6), credit(rewards, {"r": 1.0}))
    tied = credit({"r": jnp.full((1, 1, 1, 6), 0.3)}, {"r": 1.0}, best_of=2)
    np.testing.assert_array_equal(tied, np.zeros((1, 1, 6)))
    # Tied, but better than other prompts': still as many as were asked for.
    lifted = credit({"r": jnp.array([[[[1.0] * 6]], [[[0.0] * 6]]])}, {"r": 1.0}, absolute=1.0, best_of=2)
    assert (np.asarray(lifted) != 0).tolist() == 2 * [[[True, False, False, False, False, True]]]


def test_with_everything_off_it_is_the_papers_formula_to_the_last_bit():
    r = jnp.array(np.random.default_rng(5).normal(size=(3, 4, 1, 12)), jnp.float32)
    expected = (r - r.mean(-1, keepdims=True)) / (r.std(-1, ddof=1, keepdims=True) + 1e-8)
    np.testing.assert_array_equal(credit_of({"r": r}, jnp.ones(r.shape, bool), {"r": 1.0}), expected[:, :, 0])


def test_share_of_groups_without_spread():
    rewards = jnp.array([[1.0, 1.0], [1.0, 2.0], [0.3, 0.3], [0.0, -1.0]])
    assert zero_spread_share(rewards) == 0.5


def two_rewards():
    """[P=2, E=2, R=1, G=3]; the second one's scale is ten times that of the first."""
    first = jnp.array([[[[1.0, 2, 3]], [[3, 1, 2]]], [[[0, 0, 3]], [[5, 5, 5]]]])
    second = 10 * jnp.array([[[[3.0, 2, 1]], [[1, 2, 3]]], [[[1, 2, 3]], [[2, 1, 3]]]])
    return {"first": first, "second": second}


def test_the_weighted_sum_is_normalised_once():
    """By hand: .5 R1 + .1 R2 of the first group is (3.5, 3, 2.5), of std .5."""
    got = credit(two_rewards(), {"first": 0.5, "second": 0.1}, "sum")
    chex.assert_trees_all_close(got[0, 0], jnp.array([1.0, 0.0, -1.0]), atol=1e-5)
    chex.assert_trees_all_close(got[1, 1], jnp.array([0.0, -1.0, 1.0]), atol=1e-5)


def test_decoupled_has_mean_0_and_std_1_over_all_samples_and_keeps_the_order():
    weights = {"first": 1.0, "second": 2.0}
    added, decoupled = credit(two_rewards(), weights), credit(two_rewards(), weights, "decoupled")
    expected = (np.asarray(added) - np.mean(added)) / np.std(added, ddof=1)
    chex.assert_trees_all_close(decoupled, expected.astype(np.float32), atol=1e-5)
    # More rewards make "advantages" larger, and leave "decoupled" as large as it was.
    assert np.std(added) > 1.5


def test_one_rewards_advantage_is_clipped_and_the_others_are_not():
    rewards = {name: jnp.array([[[[0.0, 0, 0, 0, 10]]]]) for name in ("outlier", "other")}
    free = credit(rewards, {"outlier": 1.0, "other": 0.0})[0, 0, -1]
    assert free > 1.5
    assert credit(rewards, {"outlier": 1.0, "other": 0.0}, clips={"outlier": 0.5})[0, 0, -1] == 0.5
    assert credit(rewards, {"outlier": 0.0, "other": 1.0}, clips={"outlier": 0.5})[0, 0, -1] == free


@pytest.mark.parametrize("combination", ["advantages", "sum", "decoupled"])
@pytest.mark.parametrize("left", [0.0, 1e9])
def test_a_group_that_lacks_a_score_is_left_out_and_the_others_are_as_without_it(combination, left):
    rewards = two_rewards()
    rewards["second"] = rewards["second"].at[1, 0, 0, 2].set(left)  # what stands there means nothing
    came = jnp.ones((2, 2, 1, 3), bool).at[1, 0, 0, 2].set(False)
    np.testing.assert_array_equal(complete_groups(came), [[True, True], [False, True]])
    weights = {"first": 1.0, "second": 1.0}
    got = np.asarray(credit(rewards, weights, combination, came=came))
    np.testing.assert_array_equal(got[1, 0], 0)

    # The other three groups, as if they were all: one prompt, three active steps.
    kept = {name: jnp.stack([r[0, 0], r[0, 1], r[1, 1]])[None] for name, r in two_rewards().items()}
    expected = credit(kept, weights, combination)[0]
    chex.assert_trees_all_close(np.stack([got[0, 0], got[0, 1], got[1, 1]]), np.asarray(expected), atol=1e-5)


def test_the_lowest_rewards_are_measured_by_a_mean_and_a_std_that_are_not_of_them():
    """By hand: a quarter of four is one; the others of the first group have mean 4 and std 2, of the second 2 and 1."""
    rewards = jnp.array([[[[2.0, -96, 4, 6]], [[3, 2, 1, 1]]]])
    expected = np.array([[[-1.0, -50, 0, 1], [1, 0, -1, -1]]])  # of the two lowest, which are equal, either
    np.testing.assert_allclose(credit({"r": rewards}, {"r": 1.0}, trim=0.25), expected, rtol=1e-6)
    np.testing.assert_allclose(credit({"r": rewards}, {"r": 2.0}, "sum", trim=0.49), expected, rtol=1e-6)
    assert credit({"r": rewards}, {"r": 1.0})[0, 0].max() < 0.6  # the outlier makes the others look alike


def test_trimmed_advantages_restated():
    rng = np.random.default_rng(3)
    rewards = rng.normal(size=(3, 4, 2, 10)).astype(np.float32)  # [P, E, R, G]
    came = np.ones(rewards.shape, bool)
    came[2, 1, 1, 4], rewards[2, 1, 1, 4] = False, -1e9
    got = credit({"r": jnp.array(rewards)}, {"r": 0.5}, came=jnp.array(came), trim=0.3)
    kept = np.sort(rewards.astype(np.float64))[..., 3:]
    expected = 0.5 * (rewards - kept.mean(-1, keepdims=True)) / kept.std(-1, ddof=1, keepdims=True)
    expected[2, 1] = 0
    np.testing.assert_allclose(got, expected.sum(2), atol=1e-5)


def test_equal_rewards_above_the_trimmed_ones_teach_nothing():
    """Their std is 0, by which the others would be infinitely bad."""
    rewards = jnp.array([[[[0.3, 0.3, -1.0, 0.3, 0.3]]]])
    np.testing.assert_array_equal(credit({"r": rewards}, {"r": 1.0}, trim=0.2), np.zeros((1, 1, 5)))
    assert (credit({"r": rewards}, {"r": 1.0}) != 0).all()


def test_a_share_is_so_many_samples():
    assert [trimmed(share, 12) for share in (0.0, 0.08, 0.1, 0.25, 0.9)] == [0, 0, 1, 3, 10]
    assert trimmed(0.29, 100) == 29
    rewards = jnp.array(np.random.default_rng(4).normal(size=(3, 2, 1, 12)), jnp.float32)
    np.testing.assert_array_equal(group_advantage(rewards, trim=0.08), group_advantage(rewards))


def test_how_a_sample_compares_with_all_iterations():
    rewards = jnp.array([[1.0, 4.0], [2.0, 0.0]])
    came = jnp.array([[True, True], [True, False]])
    # z of mean 2 and std 2: -1/2, 1, 0; the last never came.
    found = running_advantage(rewards, came, jnp.array(2.0), jnp.array(2.0))
    np.testing.assert_allclose(found, [[-1, 1], [0, 0]], atol=1e-6)
    # z of mean 0 and std 1: 1, 4, 2, all above: less their mean.
    found = running_advantage(rewards, came, jnp.array(0.0), jnp.array(1.0))
    np.testing.assert_allclose(found, [[-4 / 3, 5 / 3], [-1 / 3, 0]], atol=1e-6)
    # z of mean 3 and std 1: -2, 1, -1: each side sums to 1.
    found = running_advantage(rewards, came, jnp.array(3.0), jnp.array(1.0))
    np.testing.assert_allclose(found, [[-2 / 3, 1], [-1 / 3, 0]], atol=1e-6)
