"""Entropies and merges against the numbers of the paper's setting: T = 16, s = 3, a = 0.7."""

import math

import numpy as np
import pytest

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.flow.entropy import Merge, exp_entropy, merge_by_entropy, merges_by_entropy, noise_by_entropy
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.flow.process import Cps, ExactSde, FlowByStd, FlowSde

TIMES = shifted_times(16, 3.0)
PAPER = FlowSde(0.7)
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


def test_single_step_entropies():
    np.testing.assert_allclose([exp_entropy(PAPER, TIMES, step, 1) for step in range(16)], numbers(SINGLE), atol=5e-4)


@pytest.mark.parametrize("process", [PAPER, Cps(0.7), ExactSde(1.5)])
def test_entropy_is_that_of_a_gaussian(process):
    std = process.std(TIMES[5], TIMES[8], process.noise(TIMES, 5, 3))
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    assert math.isclose(exp_entropy(process, TIMES, 5, 3), math.exp(entropy), rel_tol=1e-12)


@pytest.mark.parametrize("threshold", MERGES)
def test_merge_table(threshold):
    merges = merges_by_entropy(PAPER, TIMES, ACTIVE, threshold)
    assert [merge.length for merge in merges] == MERGES[threshold]
    assert not any(merge.clamped for merge in merges)


def test_merged_entropies_at_the_papers_threshold():
    merged = [exp_entropy(PAPER, TIMES, step, MERGES[2.2][step]) for step in ACTIVE]
    np.testing.assert_allclose(merged, [2.893, 2.989, 3.096, 2.558, 2.241, 2.558, 2.362, 2.210], atol=5e-4)


def test_a_merge_is_the_smallest_that_reaches_the_threshold():
    for step in ACTIVE:
        length = merge_by_entropy(PAPER, TIMES, step, 2.2).length
        assert exp_entropy(PAPER, TIMES, step, length) >= 2.2
        assert length == 1 or exp_entropy(PAPER, TIMES, step, length - 1) < 2.2


def test_late_steps_without_a_valid_merge_are_clamped_and_say_so():
    assert merge_by_entropy(PAPER, TIMES, 15, 2.2) == Merge(1, clamped=True)
    assert merge_by_entropy(PAPER, TIMES, 12, 2.2) == Merge(4, clamped=True)


@pytest.mark.parametrize("process", [Cps(0.7), ExactSde(0.7)])
def test_clamped_merges_have_the_most_entropy(process):
    """Where the std depends on t' it falls again towards the end of the grid, and is 0 there."""
    merge = merge_by_entropy(process, TIMES, 10, 2.2)
    entropies = [exp_entropy(process, TIMES, 10, length) for length in range(1, 7)]
    assert merge == Merge(1 + int(np.argmax(entropies)), clamped=True)
    assert entropies[-1] == 0 < max(entropies) < 2.2


def test_noise_alone_meets_the_threshold_without_a_merge():
    process = noise_by_entropy(2.2)
    np.testing.assert_allclose([exp_entropy(process, TIMES, step, 1) for step in ACTIVE], 2.2, rtol=1e-12)
    np.testing.assert_allclose(process.noise(TIMES, 3, 1), 0.5323, atol=5e-5)
    assert merges_by_entropy(process, TIMES, ACTIVE, 2.2 - 1e-9) == (Merge(1),) * 8
    assert process.noise(TIMES, 13, 1) == TIMES[14]  # t' = .3: more than all of it there is not
    assert exp_entropy(process, TIMES, 13, 1) < 2.2


def test_eulers_kernel_meets_it_likewise():
    process = noise_by_entropy(2.2, FlowByStd)
    np.testing.assert_allclose([exp_entropy(process, TIMES, step, 1) for step in range(16)], 2.2, rtol=1e-12)


def test_a_threshold_of_no_noise_is_refused():
    with pytest.raises(ConfigError, match="stds"):
        noise_by_entropy(0.0)


def test_any_process_has_an_entropy():
    class Constant:
        """A user's own, as far as entropy needs it."""

        def noise(self, times, step, span):
            return len(times) * span / 170 * (step > 0)

        def std(self, time, next_time, noise):
            return noise * (time > next_time)

    assert merge_by_entropy(Constant(), TIMES, 3, math.sqrt(2 * math.pi * math.e) * 0.25) == Merge(3)


@pytest.mark.parametrize(("step", "merge"), [(16, 1), (14, 3), (-1, 1), (3, 0)])
def test_spans_outside_the_grid_are_refused(step, merge):
    with pytest.raises(ValueError, match="leaves the grid"):
        exp_entropy(PAPER, TIMES, step, merge)


@pytest.mark.parametrize("step", [-1, 16])
def test_merges_outside_the_grid_are_refused(step):
    with pytest.raises(ValueError, match="leaves the grid"):
        merge_by_entropy(PAPER, TIMES, step, 2.2)
