"""The statistics against values worked out by hand."""

import json
import math

import numpy as np
import pytest

from egrpo_jax.evaluation.statistics import Estimate, as_json, bootstrap, diversity, markdown, paired_change
from egrpo_jax.evaluation.statistics import compare as compare_scores
from egrpo_jax.rewards import Scores


def scores(count, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (count, 1))


def compare(name, role, base, tuned):
    """Of arrays with nan where no score came."""
    return compare_scores(name, role, Scores.of(base), None if tuned is None else Scores.of(tuned))


def test_intervals_of_two_prompts_by_hand():
    """A mean is 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4: the outer fortieths are the outer quarters."""
    assert bootstrap(np.array([[0.0], [1.0]])) == [Estimate(0.5, 0.0, 1.0)]


def test_intervals_hold_their_promise():
    """Of 200 samples of N(0, 1), 95 % should have an interval around 0; a little fewer at 40 values each."""
    values = np.random.default_rng(3).normal(size=(40, 200))
    around = np.mean([estimate.low < 0 < estimate.high for estimate in bootstrap(values)])
    assert 0.90 <= around <= 0.98


@pytest.mark.parametrize("at_once", [7 * 50, 1])  # 10,000 is no multiple of 7
def test_few_resamples_at_once_give_the_same_interval(monkeypatch, at_once):
    whole = bootstrap(scores(50))
    monkeypatch.setattr("egrpo_jax.evaluation.statistics._AT_ONCE", at_once)
    np.testing.assert_allclose(bootstrap(scores(50)), whole, atol=0.02)


def test_the_same_scores_give_the_same_numbers():
    assert bootstrap(scores(30)) == bootstrap(scores(30))


def test_comparison_by_hand():
    base = np.array([[1.0], [2.0], [3.0], [4.0]])
    tuned = np.array([[2.0], [2.0], [2.5], [6.0]])
    row = compare("hps", "train", base, tuned)
    assert (row.name, row.role, row.prompts, row.missing) == ("hps", "train", 4, 0)
    assert row.base.mean == 2.5
    assert row.tuned.mean == 3.125
    assert row.change.mean == 0.625
    assert row.win_rate.mean == (1 + 0.5 + 0 + 1) / 4
    # Of 4 draws, wins sum to 1/2 or less with probability 5/256, to 1 or less with 19/256, to 4 with 16/256.
    assert (row.win_rate.low, row.win_rate.high) == (0.25, 1.0)
    assert row.change.low < row.change.mean < row.change.high


def test_pairing_finds_what_spread_over_prompts_hides():
    base = scores(100) * 10
    row = compare("hps", "held out", base, base + 0.1 + 0.1 * scores(100, seed=1))
    assert row.tuned.low < row.base.mean < row.tuned.high
    assert row.change.low > 0


def test_samples_are_averaged_within_their_prompt():
    base = np.array([[0.0, 1.0], [2.0, 4.0]])
    row = compare("hps", "held out", base, base + np.array([[1.0, -0.5], [0.0, 0.0]]))
    assert row.prompts == 2
    assert row.base.mean == (0.5 + 3) / 2
    assert row.change.mean == 0.125
    assert row.win_rate.mean == 0.75


def test_a_prompt_without_a_score_is_left_out_of_both_and_counted():
    base = np.array([[1.0], [math.nan], [3.0], [5.0]])
    tuned = np.array([[2.0], [9.0], [math.nan], [5.0]])
    row = compare("hps", "held out", base, tuned)
    assert (row.prompts, row.missing) == (2, 2)
    assert (row.base.mean, row.tuned.mean) == (3.0, 3.5)


def test_no_score_at_all():
    row = compare("hps", "held out", np.full((3, 1), math.nan), np.ones((3, 1)))
    assert (row.prompts, row.missing) == (0, 3)
    assert "| none | none | none | none | 0 | 3 |" in markdown([row])
    assert json.loads(json.dumps(as_json(row), allow_nan=False))["base"] == {"mean": None, "low": None, "high": None}


def test_one_prompt_has_a_mean_and_no_interval():
    row = compare("hps", "held out", np.array([[0.25]]), np.array([[0.75]]))
    assert "| 0.2500 [none] | 0.7500 [none] | +0.5000 [none] | 100.0% [none] | 1 | 0 |" in markdown([row])
    assert as_json(row)["change"] == {"mean": 0.5, "low": None, "high": None}


def test_diversity_is_the_mean_over_pairs():
    features = np.random.default_rng(0).normal(size=(3, 4, 8))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    by_pairs = [np.mean([1 - features[p, i] @ features[p, j] for i in range(4) for j in range(i)]) for p in range(3)]
    np.testing.assert_allclose(diversity(features), by_pairs, atol=1e-12)


def test_diversity_of_one_image_and_of_opposites():
    right = np.array([1.0, 0.0])
    np.testing.assert_allclose(diversity(np.array([[right, right], [right, -right], [right, [0, 1]]])), [0, 2, 1])
    assert diversity(np.tile(right, (1, 12, 1)))[0] == 0


def test_table_of_two_models():
    both = compare("hps", "held out", np.array([[0.25]] * 2), np.array([[0.75]] * 2))
    assert markdown([both]).splitlines() == [
        "| score | role | base | tuned | change | win rate | prompts | missing |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| hps | held out | 0.2500 [0.2500, 0.2500] | 0.7500 [0.7500, 0.7500] | +0.5000 [+0.5000, +0.5000] "
        "| 100.0% [100.0%, 100.0%] | 2 | 0 |",
    ]


def test_table_of_one_model_has_no_empty_columns():
    alone = compare("hps", "held out", np.array([[0.25]] * 2), None)
    head, _, row = markdown([alone]).splitlines()
    assert head == "| score | role | base | prompts | missing |"
    assert row == "| hps | held out | 0.2500 [0.2500, 0.2500] | 2 | 0 |"
    assert as_json(alone)["win_rate"] is None


def test_a_paired_change_is_of_the_prompts_that_have_both_scores():
    before, after = Scores.of([1.0, 2.0, math.nan, 4.0]), Scores.of([2.0, 2.5, 3.0, math.nan])
    assert paired_change(before, after) == Estimate(0.75, 0.5, 1.0)
    assert paired_change(before, after).half_width == 0.25
    assert math.isnan(paired_change(Scores.of([math.nan]), Scores.of([1.0])).mean)
