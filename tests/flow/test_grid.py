"""Time grids against the published ones."""

import math

import numpy as np
import pytest

from egrpo_jax.flow.grid import empirical_shift, ends, resolution_shift, respaced_times, shifted_times, steps_left

TIMES = shifted_times(16, 3.0)


def test_shifted_times_against_published_grid():
    expected = "1 .9783 .9545 .9286 .9 .8684 .8333 .7941 .75 .7 .6429 .5769 .5 .4091 .3 .1667 0"
    np.testing.assert_allclose(TIMES, [float(time) for time in expected.split()], atol=5e-5)
    assert (TIMES[0], TIMES[-1]) == (1.0, 0.0)


def test_shift_of_one_is_uniform():
    np.testing.assert_allclose(shifted_times(5, 1.0), [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-15)


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 3.0), (4, 0.0), (4, math.nan)])
def test_impossible_grids_are_refused(num_steps, shift):
    with pytest.raises(ValueError, match=r"num_steps|shift"):
        shifted_times(num_steps, shift)


@pytest.mark.parametrize(("tokens", "shift"), [(256, 1.649), (1024, 1.878), (2025, 2.224), (4096, 3.158)])
def test_flux_shifts_by_resolution(tokens, shift):
    np.testing.assert_allclose(resolution_shift(tokens), shift, atol=5e-4)


def test_grid_of_the_published_pipeline():
    expected = [1, 0.9045, 0.7595, 0.5128, 0]
    np.testing.assert_allclose(shifted_times(4, resolution_shift(4096)), expected, atol=5e-5)


@pytest.mark.parametrize(
    ("tokens", "steps", "mu", "shift"),
    [
        (1024, 4, 2.03069, 7.619),
        (1024, 50, 1.70196, 5.485),
        (2025, 16, 2.03499, 7.652),
        (4096, 4, 2.29118, 9.887),
        (4096, 50, 2.02335, 7.564),
        (4301, 50, 1.18470, 3.270),
    ],
)
def test_flux2_shifts_by_resolution_and_steps(tokens, steps, mu, shift):
    np.testing.assert_allclose(math.log(empirical_shift(tokens, steps)), mu, atol=5e-6)
    np.testing.assert_allclose(empirical_shift(tokens, steps), shift, atol=5e-4)


def test_grid_of_the_published_flux2_pipeline():
    expected = [1, 0.96738, 0.90814, 0.7672, 0]
    np.testing.assert_allclose(shifted_times(4, empirical_shift(4096, 4)), expected, atol=5e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("start", "num_steps"), [(0, 4), (4, 6), (4, 3), (14, 1), (16, 0)])
def test_respaced_times_of_whole_grid_steps_are_the_grids(shift, start, num_steps):
    times = shifted_times(16, shift)
    stride = (16 - start) // max(num_steps, 1)
    np.testing.assert_allclose(respaced_times(times, start, num_steps), times[start :: stride or 1], atol=1e-14)
    assert respaced_times(times, start, num_steps)[0] == times[start]


def test_respaced_times_between_grid_steps():
    shifted = lambda u: 3 * u / (1 + 2 * u)
    np.testing.assert_allclose(respaced_times(TIMES, 11, 2), [TIMES[11], shifted(5 / 32), 0], rtol=1e-14)
    assert respaced_times((1.0, 0.0), 0, 1) == (1.0, 0.0)


def test_other_grids_are_not_respaced():
    with pytest.raises(ValueError, match="shifted grid"):
        respaced_times((1.0, 0.9, 0.5, 0.0), 0, 2)


def test_ends_and_what_is_left():
    assert ends(TIMES, 4, 3) == (TIMES[4], TIMES[7])
    assert [steps_left(TIMES, start) for start in (0, 3, 16)] == [16, 13, 0]


@pytest.mark.parametrize(("step", "span"), [(16, 1), (14, 3), (-1, 1), (3, 0)])
def test_steps_outside_the_grid_are_refused(step, span):
    with pytest.raises(ValueError, match="leaves the grid"):
        ends(TIMES, step, span)


@pytest.mark.parametrize("start", [-1, 17])
def test_starts_outside_the_grid_are_refused(start):
    with pytest.raises(ValueError, match="from 0 to 16"):
        steps_left(TIMES, start)
