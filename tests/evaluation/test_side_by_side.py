"""Models side by side: the same noise, the same rewards, the extremes."""

import json

import chex
import jax
import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.evaluation.side_by_side import (
    SHOWN,
    Judging,
    Pair,
    compare_all,
    extremes,
    features_of,
    gain,
    gains_and_losses,
    sample_and_score,
    score_lines,
)
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.pipelines import ModelConfig, load_pipeline
from egrpo_jax.rewards import CheckedReward, load_reward
from tests import toy

PROMPTS = ["a", "tree", "a green sea", "abc", "eel", "a bee and a beetle", "no", "ease", "area", "x", "sleep"]


def never_for_trees(images, prompts):
    """`toy.brightness`, but for one prompt no score comes."""
    return np.where([prompt == "tree" for prompt in prompts], np.nan, toy.brightness(images, prompts))


def corner(images):
    """Unit vectors of the upper left pixel."""
    vectors = images[:, 0, 0]
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def judging(**arguments):
    return Judging(
        checked(redness=toy.redness, brightness=toy.brightness, gappy=never_for_trees), "brightness", **arguments
    )


def checked(**rewards):
    return {name: CheckedReward(name, reward) for name, reward in rewards.items()}


def results(judging, batch=4, prompts=PROMPTS, models=2, seed=0):
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        pipeline = load_pipeline(ModelConfig(name="tests.toy:pipeline"))
        params = [pipeline.load(mesh), toy.params(seed=5, width=12)]
        sampler = Sampler(pipeline, shifted_times(4, 3.0), batch)
        return sample_and_score(sampler, params[:models], prompts, seed, batch, judging)


def test_scores_are_those_of_the_sampler_with_one_seed_a_sample():
    found = results(judging(samples=3), seed=7)
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        pipeline = load_pipeline(ModelConfig(name="tests.toy:pipeline"))
        sampler = Sampler(pipeline, shifted_times(4, 3.0), 4)
        for model, params in enumerate([pipeline.load(mesh), toy.params(seed=5, width=12)]):
            for sample in range(3):
                batches = sampler(params, PROMPTS, jax.random.key(7 + sample))
                joined = np.concatenate([images for _, images in batches])
                scores = found.scores[model]["brightness"].values
                assert scores.shape == (len(PROMPTS), 3)
                np.testing.assert_allclose(scores[:, sample], toy.brightness(joined, PROMPTS), atol=1e-6)
    assert found.resolution == (4, 4)


@pytest.mark.parametrize("batch", [1, 3, 11])
def test_nothing_depends_on_the_batch(batch):
    whole, parts = (results(judging(samples=2, features=corner), batch=b) for b in (4, batch))
    for one, other in zip(whole.scores, parts.scores, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            chex.assert_trees_all_close(one[name], other[name], atol=1e-6)
    assert [pair.prompt for pair in whole.pairs] == [pair.prompt for pair in parts.pairs]


def test_base_and_tuned_have_the_same_noise():
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        pipeline = load_pipeline(ModelConfig(name="tests.toy:pipeline"))
        sampler = Sampler(pipeline, shifted_times(4, 3.0), 4)
        same = sample_and_score(sampler, [pipeline.load(mesh)] * 2, PROMPTS, 0, 4, judging())
    chex.assert_trees_all_equal(same.scores[0]["redness"], same.scores[1]["redness"])
    assert not same.pairs
    assert gains_and_losses(same.pairs, "brightness") is None


def test_lines_say_what_the_table_says():
    judged = judging(samples=2, features=corner)
    found = results(judged)
    lines = [json.loads(line) for line in score_lines(PROMPTS, found.scores).splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [(p, s) for p in PROMPTS for s in (0, 1)]
    for row in compare_all(found.scores, judged, train=("redness",)):
        assert row.missing == (1 if row.name == "gappy" else 0)
        base, tuned = ([line[model][row.name] for line in lines] for model in ("base", "tuned"))
        assert np.mean([value for value in base if value is not None]) == pytest.approx(row.base.mean, abs=1e-12)
        changes = [new - old for old, new in zip(base, tuned, strict=True) if old is not None]
        assert np.mean(changes) == pytest.approx(row.change.mean, abs=1e-12)
    assert [line["base"]["gappy"] for line in lines if line["prompt"] == "tree"] == [None, None]


def test_roles_and_diversity_are_columns():
    judged = judging(samples=2, features=corner, diversity="diversity (corner)")
    rows = {row.name: row for row in compare_all(results(judged).scores, judged, train=("redness",))}
    assert {name: row.role for name, row in rows.items()} == {
        "redness": "train",
        "brightness": "held out",
        "gappy": "held out",
        "diversity (corner)": "within a prompt",
    }
    assert rows["diversity (corner)"].base.mean > 0


def test_the_base_alone():
    judged = judging()
    found = results(judged, models=1)
    assert not found.pairs
    assert all(row.change is None for row in compare_all(found.scores, judged, train=()))
    assert "tuned" not in json.loads(score_lines(PROMPTS, found.scores).splitlines()[0])


def test_scoring_elsewhere_goes_on_while_the_tuned_model_samples():
    reward = toy.Unreliable(fails=(1,))
    judged = Judging(checked(remote=reward), judge="remote")
    found = results(judged, batch=len(PROMPTS))
    assert reward.log == [("handed in", 0), ("handed in", 1), ("waited for", 0), ("waited for", 1)]
    (row,) = compare_all(found.scores, judged, train=())
    assert (row.prompts, row.missing) == (len(PROMPTS) - 1, 1)
    assert PROMPTS[-1] not in [shown.prompt for shown in found.pairs]


def pair(number, gained):
    image = np.full((4, 4, 3), number, np.uint8)
    return Pair(f"prompt {number}", (0.5, 0.5 + gained), (image, image))


def test_extremes_found_in_parts_are_those_of_all():
    gains = np.random.default_rng(0).integers(-20, 20, 90) / 8  # many are equal, some are 0
    pairs = [pair(number, gained) for number, gained in enumerate(gains)]
    kept = []
    for start in range(0, 90, 7):
        kept = extremes(kept + extremes(pairs[start : start + 7]))
    assert [p.prompt for p in kept] == [p.prompt for p in extremes(pairs)]
    expected = [*np.sort(gains)[::-1][:SHOWN], *np.sort(gains)[::-1][-SHOWN:]]
    np.testing.assert_allclose([gain(p) for p in kept], expected)


@pytest.mark.parametrize("samples", [1, 2])
def test_images_of_the_largest_gains_and_losses(samples):
    found = results(judging(samples=samples))
    scores = [of_model["brightness"].values[:, 0] for of_model in found.scores]
    order = np.argsort(scores[0] - scores[1], kind="stable")
    assert found.pairs[0].prompt == PROMPTS[order[0]]
    assert found.pairs[-1].prompt == PROMPTS[order[-1]]
    for shown in found.pairs:
        for side, image in enumerate(shown.images):
            assert shown.scores[side] == scores[side][PROMPTS.index(shown.prompt)]
            assert image.mean() / 255 == pytest.approx(shown.scores[side], abs=1 / 255)
    both = gains_and_losses(found.pairs, "brightness")
    gains = gains_and_losses([p for p in found.pairs if gain(p) > 0], "brightness")
    losses = gains_and_losses([p for p in found.pairs if gain(p) < 0], "brightness")
    assert both.height == gains.height + losses.height


def test_large_images_are_kept_small(monkeypatch):
    monkeypatch.setattr("egrpo_jax.evaluation.side_by_side._SHOWN_SIDE", 2)
    assert {image.shape for p in results(judging()).pairs for image in p.images} == {(2, 2, 3)}


def infinite_for_trees(images, prompts):
    """`toy.brightness`, but for one prompt infinite."""
    return np.where([prompt == "tree" for prompt in prompts], np.inf, toy.brightness(images, prompts))


def test_an_infinite_score_is_a_missing_one():
    judged = Judging(checked(infinite=infinite_for_trees), judge="infinite")
    found = results(judged)
    (row,) = compare_all(found.scores, judged, train=())
    assert (row.prompts, row.missing) == (len(PROMPTS) - 1, 1)
    lines = [json.loads(line) for line in score_lines(PROMPTS, found.scores).splitlines()]
    assert [line["prompt"] for line in lines if line["tuned"]["infinite"] is None] == ["tree"]
    assert "tree" not in [shown.prompt for shown in found.pairs]


def test_features_of_the_emoji_towers_measure_diversity():
    tower = load_reward("emoji_judge")
    encode = features_of("emoji_judge", tower)
    images = np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype(np.float32)
    vectors = np.asarray(encode(images))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-5)
    with pytest.raises(UserError, match="'mine' has no image features"):
        features_of("mine", checked(mine=toy.brightness)["mine"])
