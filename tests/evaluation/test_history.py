"""Sampling for evaluations, its record, and the warning of reward hacking."""

import jax
import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.evaluation.history import (
    Evaluation,
    evaluation_metrics,
    load_evaluations,
    make_evaluation,
    parted_rewards,
    save_evaluation,
)
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from tests import toy

PROMPTS = [f"prompt {'x' * i}" for i in range(7)]
IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


def sample(batch, prompts=PROMPTS):
    pipeline = toy.pipeline(None)
    with jax.set_mesh(mesh := make_mesh(MeshConfig())):
        return Sampler(pipeline, shifted_times(4, 3.0), batch)(pipeline.load(mesh), prompts, jax.random.key(0))


def test_samples_do_not_depend_on_the_batch():
    whole = sample(7)
    assert whole.shape == (7, 4, 4, 3)
    np.testing.assert_allclose(sample(3), whole, atol=1e-6)
    np.testing.assert_allclose(sample(50, PROMPTS[:2]), whole[:2], atol=1e-6)
    assert np.abs(whole[0] - whole[1]).mean() > 0.01


def evaluation(iteration, **scores):
    return Evaluation(iteration, {name: np.asarray(values) for name, values in scores.items()}, IMAGES)


def test_record_is_read_back_up_to_an_iteration(tmp_path):
    images = sample(7)
    first = make_evaluation(0, {"bright": toy.brightness}, images, PROMPTS, kept=2)
    save_evaluation(tmp_path, first)
    save_evaluation(tmp_path, first._replace(iteration=10))
    save_evaluation(tmp_path, first._replace(iteration=20))
    assert [record.iteration for record in load_evaluations(tmp_path, 10, ["bright"], 7)] == [0, 10]
    read = load_evaluations(tmp_path, 0, ["bright"], 7)[0]
    np.testing.assert_array_equal(read.scores["bright"], first.scores["bright"])
    np.testing.assert_array_equal(read.images, first.images)
    assert read.images.shape == (2, 4, 4, 3)


def test_a_damaged_record_is_named(tmp_path):
    save_evaluation(tmp_path, evaluation(0, a=[1.0, 2.0]))
    path = tmp_path / "eval" / "000000.npz"
    path.write_bytes(b"PK" + path.read_bytes()[20:])
    with pytest.raises(UserError, match=r"cannot read .*000000\.npz"):
        load_evaluations(tmp_path, 0, ["a"], 2)


@pytest.mark.parametrize(("rewards", "num_prompts"), [(["b"], 2), (["a", "b"], 2), (["a"], 3)])
def test_a_record_of_something_else_is_refused(tmp_path, rewards, num_prompts):
    save_evaluation(tmp_path, evaluation(0, a=[1.0, 2.0]))
    with pytest.raises(UserError, match=r"000000\.npz is of other rewards or prompts"):
        load_evaluations(tmp_path, 0, rewards, num_prompts)


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(UserError, match="found no evaluation"):
        load_evaluations(tmp_path, 5, ["a"], 2)


def test_metrics_are_paired_changes():
    metrics = evaluation_metrics(evaluation(0, a=[1.0, 2.0, 3.0]), evaluation(5, a=[2.0, 2.5, 4.5]))
    assert metrics["eval/a/mean"] == 3.0
    assert metrics["eval/a/change"] == 1.0
    # Differences 1, .5, 1.5: standard error .5 / sqrt(3), t quantile 4.303 at two degrees of freedom.
    np.testing.assert_allclose(metrics["eval/a/change_ci95"], 4.303 * 0.5 / 3**0.5, rtol=1e-3)


RNG = np.random.default_rng(0)
BASE = RNG.normal(size=100)
WIGGLE = 0.01 * RNG.normal(size=100)
WIGGLE -= WIGGLE.mean()


@pytest.mark.parametrize(
    ("trained", "judged", "parted"),
    [
        (0.1, -0.1, True),
        (0.1, 0.1, False),
        (-0.1, -0.1, False),
        (0.1, -0.0001, False),  # within its interval
        (0.0001, -0.1, False),
    ],
)
def test_rewards_that_part_ways_are_reported(trained, judged, parted):
    history = [
        evaluation(0, weak=BASE, judge=BASE),
        evaluation(10, weak=BASE + trained + WIGGLE, judge=BASE + judged - WIGGLE),
    ]
    warnings = parted_rewards(history, ["weak"], ["judge"])
    assert bool(warnings) == parted
    if parted:
        (line,) = warnings
        assert "since iteration 0 the trained weak rose by 0.1000" in line
        assert "the held-out judge fell by 0.1000" in line


def test_the_fall_is_counted_from_the_judges_best():
    history = [
        evaluation(0, weak=BASE, judge=BASE),
        evaluation(10, weak=BASE + 0.1, judge=BASE + 0.2),
        evaluation(20, weak=BASE + 0.2 + WIGGLE, judge=BASE + 0.1 + WIGGLE),
    ]
    assert "since iteration 10" in parted_rewards(history, ["weak"], ["judge"])[0]


def test_scores_that_never_came_are_counted_and_left_out():
    first, now = evaluation(0, a=[1.0, 2.0, np.nan]), evaluation(5, a=[2.0, np.nan, 4.0])
    metrics = evaluation_metrics(first, now)
    assert metrics["eval/a/mean"] == 3
    assert metrics["eval/a/missing"] == 1
    assert metrics["eval/a/change"] == 1
    # A server that was down for a whole evaluation is neither best nor a fall.
    down = evaluation(5, a=[np.nan] * 3, b=[3.0, 4.0, 5.0])
    up = evaluation(0, a=[1.0, 1.0, 1.0], b=[1.0, 2.0, 3.1])
    assert parted_rewards([down, up], ["b"], ["a"]) == parted_rewards([up, down], ["b"], ["a"]) == []
