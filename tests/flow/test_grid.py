"""Time grids against the published ones."""

import math

import numpy as np
import pytest

from egrpo_jax.flow.grid import ends, resolution_shift, shifted_times

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


def test_ends_of_a_step():
    assert ends(TIMES, 4, 3) == (TIMES[4], TIMES[7])


@pytest.mark.parametrize(("step", "span"), [(16, 1), (14, 3), (-1, 1), (3, 0)])
def test_steps_outside_the_grid_are_refused(step, span):
    with pytest.raises(ValueError, match="leaves the grid"):
        ends(TIMES, step, span)
