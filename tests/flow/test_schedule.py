"""Schedules against the numbers of the paper's setting: T = 16, s = 3, a = 0.7."""

import math

import numpy as np
import pytest

from egrpo_jax.flow.entropy import Merge, exp_entropy, merge_by_entropy, merges_by_entropy, sigma
from egrpo_jax.flow.grid import resolution_shift, shifted_times

TIMES = shifted_times(16, 3.0)
ACTIVE = range(8)
SINGLE = "2.893 2.989 2.137 1.763 1.542 1.392 1.281 1.193 1.120 1.056 .997 .937 .872 .795 .692 .528"
MERGES = {
    0.0: [1, 1, 1, 1, 1, 1, 1, 1],
    1.8: [1, 1, 1, 2, 2, 2, 2, 3],
    2.0: [1, 1, 1, 2, 2, 2, 3, 3],
    2.2: [1, 1, 2, 2, 2, 3, 3, 3],
    2.6: [1, 1, 2, 3, 3, 4, 4, 4],
}


def numbers(text):
    return [float(number) for number in text.split()]


def test_shifted_times_against_published_grid():
    expected = "1 .9783 .9545 .9286 .9 .8684 .8333 .7941 .75 .7 .6429 .5769 .5 .4091 .3 .1667 0"
    np.testing.assert_allclose(TIMES, numbers(expected), atol=5e-5)
    assert (TIMES[0], TIMES[-1]) == (1.0, 0.0)


def test_shift_of_one_is_uniform():
    np.testing.assert_allclose(shifted_times(5, 1.0), [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-15)


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 3.0), (4, 0.0), (4, math.nan)])
def test_impossible_grids_are_refused(num_steps, shift):
    with pytest.raises(ValueError, match=r"num_steps|shift"):
        shifted_times(num_steps, shift)


def test_single_step_entropies():
    np.testing.assert_allclose([exp_entropy(TIMES, step, 1, 0.7) for step in range(16)], numbers(SINGLE), atol=5e-4)


def test_entropy_is_that_of_a_gaussian():
    std = sigma(TIMES, 5, 0.7) * math.sqrt(TIMES[5] - TIMES[8])
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    assert math.isclose(exp_entropy(TIMES, 5, 3, 0.7), math.exp(entropy), rel_tol=1e-12)


def test_sigma_at_pure_noise_uses_the_next_time():
    assert math.isclose(sigma(TIMES, 0, 0.7), 0.7 / math.sqrt(1 - TIMES[1]), rel_tol=1e-12)
    assert math.isclose(sigma(TIMES, 4, 0.7), 0.7 * 3.0, rel_tol=1e-12)  # t = 0.9


@pytest.mark.parametrize("threshold", MERGES)
def test_merge_table(threshold):
    merges = merges_by_entropy(TIMES, ACTIVE, 0.7, threshold)
    assert [merge.length for merge in merges] == MERGES[threshold]
    assert not any(merge.clamped for merge in merges)


def test_merged_entropies_at_the_papers_threshold():
    merged = [exp_entropy(TIMES, step, MERGES[2.2][step], 0.7) for step in ACTIVE]
    np.testing.assert_allclose(merged, [2.893, 2.989, 3.096, 2.558, 2.241, 2.558, 2.362, 2.210], atol=5e-4)


def test_a_merge_is_the_smallest_that_reaches_the_threshold():
    for step in ACTIVE:
        length = merge_by_entropy(TIMES, step, 0.7, 2.2).length
        assert exp_entropy(TIMES, step, length, 0.7) >= 2.2
        assert length == 1 or exp_entropy(TIMES, step, length - 1, 0.7) < 2.2


def test_late_steps_without_a_valid_merge_are_clamped_and_say_so():
    assert merge_by_entropy(TIMES, 15, 0.7, 2.2) == Merge(1, clamped=True)
    assert merge_by_entropy(TIMES, 12, 0.7, 2.2) == Merge(4, clamped=True)


@pytest.mark.parametrize(("step", "merge"), [(16, 1), (14, 3), (-1, 1), (3, 0)])
def test_spans_outside_the_grid_are_refused(step, merge):
    with pytest.raises(ValueError, match="leaves the grid"):
        exp_entropy(TIMES, step, merge, 0.7)


@pytest.mark.parametrize(("tokens", "shift"), [(256, 1.649), (1024, 1.878), (2025, 2.224), (4096, 3.158)])
def test_flux_shifts_by_resolution(tokens, shift):
    np.testing.assert_allclose(resolution_shift(tokens), shift, atol=5e-4)


def test_grid_of_the_published_pipeline():
    expected = [1, 0.9045, 0.7595, 0.5128, 0]
    np.testing.assert_allclose(shifted_times(4, resolution_shift(4096)), expected, atol=5e-5)
