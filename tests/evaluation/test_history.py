"""Sampling for evaluations, its record, and the warning of reward hacking."""

import shutil

import chex
import jax
import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.evaluation.history import (
    Evaluation,
    evaluate,
    evaluation_numbers,
    load_evaluations,
    parted_rewards,
    save_evaluation,
)
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.rewards import CheckedReward, Scores
from tests import toy

PROMPTS = [f"prompt {'x' * i}" for i in range(7)]
IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


def evaluation(iteration, **scores):
    return Evaluation(iteration, {name: Scores.of(values) for name, values in scores.items()}, IMAGES)


@pytest.fixture(scope="module")
def first():
    pipeline = toy.pipeline(None)
    rewards = {"bright": CheckedReward("bright", toy.brightness)}
    with jax.set_mesh(mesh := make_mesh(MeshConfig())):
        sampler = Sampler(pipeline, shifted_times(4, 3.0), 3)
        return evaluate(0, sampler, pipeline.load(mesh), PROMPTS, jax.random.key(0), rewards, 2)


def test_an_evaluation_scores_every_prompt_and_keeps_evenly_spread_images(first):
    chex.assert_shape(first.scores["bright"].values, (7,))
    assert first.scores["bright"].came.all()
    assert first.images.dtype == np.uint8
    scored = first.scores["bright"].values[[0, 6]]
    np.testing.assert_allclose(first.images.mean((1, 2, 3)) / 255, scored, atol=1 / 255)


def test_record_is_read_back_up_to_an_iteration(tmp_path, first):
    for iteration in (0, 10, 20):
        save_evaluation(tmp_path, first._replace(iteration=iteration), "hash")
    shutil.copy(tmp_path / "eval" / "000010.npz", tmp_path / "eval" / "000010 (copy).npz")
    assert [record.iteration for record in load_evaluations(tmp_path, 10, ["bright"], "hash")] == [0, 10]
    chex.assert_trees_all_equal(load_evaluations(tmp_path, 0, ["bright"], "hash")[0], first)


@pytest.mark.parametrize(
    "damage", ["head", "truncated", "flipped", "empty", "other arrays", "fewer scores", "other kind"]
)
def test_a_damaged_record_is_named(tmp_path, damage):
    save_evaluation(tmp_path, evaluation(0, a=[1.0, 2.0]), "hash")
    path = tmp_path / "eval" / "000000.npz"
    content = bytearray(path.read_bytes())
    if damage == "head":
        content = b"PK" + content[20:]
    elif damage == "truncated":
        content = content[:-40]
    elif damage == "flipped":
        content[70] ^= 255
    elif damage == "empty":
        content = b""
    path.write_bytes(content)
    if damage == "other arrays":
        np.savez(path, a=np.zeros(3))
    if damage in ("fewer scores", "other kind"):
        arrays = dict(np.load(path))
        change = {"fewer scores": lambda scores: scores[:1], "other kind": lambda scores: scores.astype(str)}[damage]
        np.savez(path, **arrays | {"score:a": change(arrays["score:a"])})
    with pytest.raises(UserError, match=r"cannot read .*000000\.npz"):
        load_evaluations(tmp_path, 0, ["a"], "hash")


@pytest.mark.parametrize(
    ("rewards", "prompts", "what"),
    [(["b"], "hash", "rewards"), (["a", "b"], "hash", "rewards"), (["a"], "x", "prompts")],
)
def test_a_record_of_something_else_is_refused(tmp_path, rewards, prompts, what):
    save_evaluation(tmp_path, evaluation(0, a=[1.0, 2.0]), "hash")
    with pytest.raises(UserError, match=rf"000000\.npz is of (the|other) {what}"):
        load_evaluations(tmp_path, 0, rewards, prompts)


def test_a_missing_record_is_named(tmp_path):
    """The first above all: without it, changes would be counted from another one."""
    for _ in range(2):
        with pytest.raises(UserError, match=r"found no .*000000\.npz, the evaluation that all later ones"):
            load_evaluations(tmp_path, 5, ["a"], "hash")
        save_evaluation(tmp_path, evaluation(4, a=[1.0, 2.0]), "hash")


def test_numbers_are_paired_changes():
    numbers = evaluation_numbers(evaluation(0, a=[1.0, 2.0]), evaluation(5, a=[2.0, 2.5]))
    assert numbers["eval/a/mean"] == 2.25
    assert numbers["eval/a/change"] == 0.75
    assert numbers["eval/a/change_ci95"] == 0.25  # between the one difference and the other


RNG = np.random.default_rng(0)
BASE = RNG.normal(size=100)
WIGGLE = 0.01 * RNG.normal(size=100)
WIGGLE -= WIGGLE.mean()


@pytest.mark.parametrize(
    ("risen", "judged", "parted"),
    [
        (0.1, -0.1, True),
        (0.1, 0.1, False),
        (-0.1, -0.1, False),
        (0.1, -0.0001, False),  # within its interval
        (0.0001, -0.1, False),
    ],
)
def test_rewards_that_part_ways_are_reported(risen, judged, parted):
    history = [
        evaluation(0, weak=BASE, judge=BASE),
        evaluation(10, weak=BASE + risen + WIGGLE, judge=BASE + judged - WIGGLE),
    ]
    warnings = parted_rewards(history, ["weak"], ["judge"])
    assert bool(warnings) == parted
    if parted:
        (line,) = warnings
        assert "since iteration 0 the training reward weak rose by 0.1000" in line
        assert "the held-out reward judge fell by 0.1000" in line


def test_the_fall_is_counted_from_the_judges_best():
    history = [
        evaluation(0, weak=BASE, judge=BASE),
        evaluation(10, weak=BASE + 0.1, judge=BASE + 0.2),
        evaluation(20, weak=BASE + 0.2 + WIGGLE, judge=BASE + 0.1 + WIGGLE),
    ]
    assert "since iteration 10" in parted_rewards(history, ["weak"], ["judge"])[0]


def test_scores_that_never_came_are_counted_and_left_out():
    first, now = evaluation(0, a=[1.0, 2.0, np.nan]), evaluation(5, a=[2.0, np.nan, 4.0])
    numbers = evaluation_numbers(first, now)
    assert numbers["eval/a/mean"] == 3
    assert numbers["eval/a/missing"] == 1
    assert numbers["eval/a/change"] == 1
    # A server that was down for a whole evaluation is neither best nor a fall.
    down = evaluation(5, a=[np.nan] * 3, b=[3.0, 4.0, 5.0])
    up = evaluation(0, a=[1.0, 1.0, 1.0], b=[1.0, 2.0, 3.1])
    assert parted_rewards([down, up], ["b"], ["a"]) == parted_rewards([up, down], ["b"], ["a"]) == []
