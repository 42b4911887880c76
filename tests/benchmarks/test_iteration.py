"""benchmarks/iteration.py, ours alone."""

import jax
import numpy as np
import pytest

from benchmarks import iteration
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from tests.benchmarks.sizes import CONFIG, SHAPE


@pytest.mark.slow
def test_our_iterations_are_timed_and_their_passes_counted():
    with jax.set_mesh(make_mesh(MeshConfig())):
        ours = iteration.Ours(SHAPE, CONFIG)
        numbers = [ours.iterate(), ours.iterate()]
    plan = ours.job.plan
    assert ours.passes == (2 * plan.rollout_passes, 2 * plan.training_passes)  # two prompts' tails leave no slot idle
    assert [set(seconds) for seconds in ours.seconds] == [{"rollout", "decode", "reward", "update", "iteration"}] * 2
    assert all(0 < seconds["update"] < seconds["iteration"] for seconds in ours.seconds)
    assert all(n["update_norm"] > 0 and n["skipped_updates"] == 0 for n in numbers)


def test_a_row_has_minima_and_ratios():
    base = np.array([[2.0, 1.0], [3.0, 0.5]])
    line = iteration.row("theirs", np.array([[4.0, 4.0], [5.0, 2.0]]), (7, 8), base)
    assert line == "| theirs | 4.00 (2.00) | 2.00 (4.00) | 7.00 (2.33) | 7 | 8 |"


def test_what_differs_is_not_compared_in_speed():
    iteration.check_near("velocities", [1.0, 2.0], [1.0, 2.0001])
    for different in ([1.0, 2.001], [1.0, np.nan]):
        with pytest.raises(AssertionError, match="not the same velocities"):
            iteration.check_near("velocities", [1.0, 2.0], different)
