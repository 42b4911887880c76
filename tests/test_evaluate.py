"""The program `evaluate` and what it is made of: toy models in this process, the embedded one as a person runs it."""

import hashlib
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from egrpo_jax.common.config import to_config_dict
from egrpo_jax.common.errors import UserError
from egrpo_jax.evaluation import protocol
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
from egrpo_jax.rewards import load_reward
from egrpo_jax.rewards.config import HpsConfig, RemoteConfig, ScorersConfig
from egrpo_jax.rl.optimizer import OptimConfig, make_optimizer
from egrpo_jax.rl.update import LearnerConfig
from egrpo_jax.run.checkpoint import Checkpoints
from egrpo_jax.run.workdir import claim_workdir
from egrpo_jax.training.config import RewardsConfig, TrainConfig
from egrpo_jax.training.state import first_progress, save
from tests import programs, toy

PROMPTS = ["a", "tree", "a green sea", "abc", "eel", "a bee and a beetle", "no", "ease", "area", "x", "sleep"]


def never_for_trees(images, prompts):
    """`toy.brightness`, but for one prompt no score comes."""
    return np.where([prompt == "tree" for prompt in prompts], np.nan, toy.brightness(images, prompts))


def corner(images):
    """Unit vectors of the upper left pixel."""
    vectors = images[:, 0, 0]
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def judging(**arguments):
    rewards = {"redness": toy.redness, "brightness": toy.brightness, "gappy": never_for_trees}
    return Judging(rewards, judge="brightness", **arguments)


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
                pictures = sampler(params, PROMPTS, jax.random.key(7 + sample))
                scores = found.scores[model]["brightness"]
                assert scores.shape == (len(PROMPTS), 3)
                np.testing.assert_allclose(scores[:, sample], toy.brightness(pictures, PROMPTS), atol=1e-6)
    assert found.resolution == (4, 4)


@pytest.mark.parametrize("batch", [1, 3, 11])
def test_nothing_depends_on_the_batch(batch):
    whole, parts = (results(judging(samples=2, features=corner), batch=b) for b in (4, batch))
    for one, other in zip(whole.scores, parts.scores, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], atol=1e-6)
    assert [pair.prompt for pair in whole.pairs] == [pair.prompt for pair in parts.pairs]


def test_base_and_tuned_have_the_same_noise():
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        pipeline = load_pipeline(ModelConfig(name="tests.toy:pipeline"))
        sampler = Sampler(pipeline, shifted_times(4, 3.0), 4)
        same = sample_and_score(sampler, [pipeline.load(mesh)] * 2, PROMPTS, 0, 4, judging())
    np.testing.assert_array_equal(same.scores[0]["redness"], same.scores[1]["redness"])
    assert not same.pairs
    assert gains_and_losses(same.pairs, "brightness") is None


def test_lines_say_what_the_table_says():
    judged = judging(samples=2, features=corner)
    found = results(judged)
    lines = [json.loads(line) for line in score_lines(PROMPTS, found.scores).splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [(p, s) for p in PROMPTS for s in (0, 1)]
    for row in compare_all(found.scores, judged, trained=("redness",)):
        assert row.missing == (1 if row.name == "gappy" else 0)
        base, tuned = ([line[model][row.name] for line in lines] for model in ("base", "tuned"))
        assert np.mean([value for value in base if value is not None]) == pytest.approx(row.base.mean, abs=1e-12)
        changes = [new - old for old, new in zip(base, tuned, strict=True) if old is not None]
        assert np.mean(changes) == pytest.approx(row.change.mean, abs=1e-12)
    assert [line["base"]["gappy"] for line in lines if line["prompt"] == "tree"] == [None, None]


def test_roles_and_diversity_are_columns():
    judged = judging(samples=2, features=corner, diversity="diversity (corner)")
    rows = {row.name: row for row in compare_all(results(judged).scores, judged, trained=("redness",))}
    assert {name: row.role for name, row in rows.items()} == {
        "redness": "trained on",
        "brightness": "held out",
        "gappy": "held out",
        "diversity (corner)": "within a prompt",
    }
    assert rows["diversity (corner)"].base.mean > 0


def test_the_base_alone():
    judged = judging()
    found = results(judged, models=1)
    assert not found.pairs
    assert all(row.change is None for row in compare_all(found.scores, judged, trained=()))
    assert "tuned" not in json.loads(score_lines(PROMPTS, found.scores).splitlines()[0])


def test_a_reward_of_the_wrong_shape():
    wrong = Judging({"wrong": lambda images, _: images.mean((1, 2))}, judge="wrong")
    with pytest.raises(UserError, match=r"'wrong' gave scores \(4, 3\) for 4 images"):
        results(wrong)


def test_scoring_elsewhere_goes_on_while_the_tuned_model_samples():
    reward = toy.Unreliable(fails=(1,))
    judged = Judging({"remote": reward}, judge="remote")
    found = results(judged, batch=len(PROMPTS))
    assert reward.log == [("handed in", 0), ("handed in", 1), ("waited for", 0), ("waited for", 1)]
    (row,) = compare_all(found.scores, judged, trained=())
    assert (row.prompts, row.missing) == (len(PROMPTS) - 1, 1)
    assert PROMPTS[-1] not in [shown.prompt for shown in found.pairs]


def pair(number, gained):
    picture = np.full((4, 4, 3), number, np.uint8)
    return Pair(f"prompt {number}", (0.5, 0.5 + gained), (picture, picture))


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
def test_pictures_of_the_largest_gains_and_losses(samples):
    found = results(judging(samples=samples))
    scores = [of_model["brightness"][:, 0] for of_model in found.scores]
    order = np.argsort(scores[0] - scores[1], kind="stable")
    assert found.pairs[0].prompt == PROMPTS[order[0]]
    assert found.pairs[-1].prompt == PROMPTS[order[-1]]
    for shown in found.pairs:
        for side, picture in enumerate(shown.pictures):
            assert shown.scores[side] == scores[side][PROMPTS.index(shown.prompt)]
            assert picture.mean() / 255 == pytest.approx(shown.scores[side], abs=1 / 255)
    both = gains_and_losses(found.pairs, "brightness")
    gains = gains_and_losses([p for p in found.pairs if gain(p) > 0], "brightness")
    losses = gains_and_losses([p for p in found.pairs if gain(p) < 0], "brightness")
    assert both.height == gains.height + losses.height


def test_large_pictures_are_kept_small(monkeypatch):
    monkeypatch.setattr("egrpo_jax.evaluation.side_by_side._SHOWN_SIDE", 2)
    assert {picture.shape for p in results(judging()).pairs for picture in p.pictures} == {(2, 2, 3)}


def test_features_of_the_emoji_towers_measure_diversity():
    tower = load_reward("emoji_judge")
    encode = features_of("emoji_judge", tower)
    images = np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype(np.float32)
    vectors = np.asarray(encode(images))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-5)
    with pytest.raises(UserError, match="'mine' has no image features"):
        features_of("mine", toy.brightness)


def test_hash_is_that_of_a_text_file():
    described = protocol.describe_prompts("mine.txt", ["one", "zwölf"])
    assert described["sha256"] == hashlib.sha256("one\nzwölf\n".encode()).hexdigest()
    assert described["count"] == 2


def test_what_was_trained_on_is_what_the_run_says(tmp_path):
    config = TrainConfig(rewards=RewardsConfig(train=("emoji",)))
    assert protocol.trained_rewards(config.rewards.train, None) == ("emoji",)
    claim_workdir(tmp_path, {"rewards": {"train": ["emoji_weak"]}}, False)
    assert protocol.trained_rewards(config.rewards.train, tmp_path) == ("emoji_weak",)
    with pytest.raises(UserError, match=r"found no config\.json"):
        protocol.trained_rewards(config.rewards.train, tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        protocol.trained_rewards(config.rewards.train, tmp_path)


def test_a_model_is_described_by_what_it_has():
    about = {"guidance": 4.5, "lora_weights": None}
    described = protocol.describe_model(ModelConfig("flux", path="org/model"), SimpleNamespace(about=about))
    assert described == {"name": "flux", "path": "org/model", "guidance": 4.5}


def test_rewards_are_described_without_secrets():
    chat = RemoteConfig("http://host/v1?key=secret", protocol="chat", model="Judge-7B")
    scorers = ScorersConfig(hps=HpsConfig(path="hps.pt"), remote={"vlm": chat})
    assert protocol.describe_reward("imagereward", scorers).endswith(
        "(THUDM/ImageReward, google-bert/bert-base-uncased)"
    )
    assert protocol.describe_reward("vlm", scorers) == "at http://host/v1, protocol chat, Judge-7B"
    assert protocol.describe_reward("mine:reward", scorers) == "the user's own"
    assert "secret" not in json.dumps(protocol.public_config(to_config_dict(TrainConfig(scorers=scorers)).to_dict()))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of the embedded model whose weights have grown by a hundredth, saved as iteration 3."""
    path = tmp_path_factory.mktemp("run")
    config = TrainConfig(learner=LearnerConfig(ema_decay=0.9))  # as configs/emoji.py has it
    mesh = make_mesh(config.mesh)
    pipeline = load_pipeline(config.model)
    grown = jax.tree.map(lambda x: x * 1.01, pipeline.load(mesh))
    checkpoints = Checkpoints(path / "checkpoints", keep=2)
    save(checkpoints, first_progress(grown, make_optimizer(OptimConfig()), config)._replace(iteration=3))
    checkpoints.close()
    claim_workdir(path, to_config_dict(config).to_dict(), False)
    return path


def run(out, *arguments):
    small = ["--steps=2", "--batch=4", "--rewards=emoji,emoji_judge"]
    return programs.run("evaluate", "--config=configs/emoji.py", f"--out={out}", *small, *arguments)


@pytest.mark.slow
def test_the_embedded_model_twice_with_equal_bytes(tmp_path, workdir):
    (tmp_path / "names.txt").write_text("red heart\ncat face\nowl\nviolin\nrocket\nkey\n")
    arguments = [f"--workdir={workdir}", f"--prompt_file={tmp_path}/names.txt", "--samples=2"]
    for out in ("a", "b"):
        done = run(tmp_path / out, *arguments, "--diversity=emoji_judge")
        assert done.returncode == 0, done.stderr
    first = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert sorted(first) == ["gains.png", "scores.jsonl", "table.json", "table.md"]
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert done.stdout.startswith(first["table.md"].decode())

    table = json.loads(first["table.json"])
    assert [row["name"] for row in table["scores"]] == ["emoji", "emoji_judge", "diversity (emoji_judge)"]
    assert [row["prompts"] for row in table["scores"]] == [6, 6, 6]
    made = table["protocol"]
    assert made["tuned"] == {"workdir": str(workdir), "iteration": 3, "ema_decay": 0.9}
    assert made["prompts"]["sha256"] == hashlib.sha256((tmp_path / "names.txt").read_bytes()).hexdigest()
    assert (made["steps"], made["seeds"], made["resolution"]) == (2, [0, 1], {"height": 32, "width": 32})
    lines = [json.loads(line) for line in first["scores.jsonl"].decode().splitlines()]
    for row in table["scores"]:
        for model in ("base", "tuned"):
            mean = np.mean([line[model][row["name"]] for line in lines])
            assert math.isclose(mean, row[model]["mean"], rel_tol=1e-12)
    with Image.open(tmp_path / "a" / "gains.png") as picture:
        assert picture.width > 160


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--diversity=emoji_judge"], "--diversity needs at least 2 images of each prompt, found --samples=1"),
        (["--rewards=nothing"], "unknown reward 'nothing'"),
        (["--out={}/file/x"], "cannot write {}/file/x"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    done = run(tmp_path / "out", *(argument.replace("{}", str(tmp_path)) for argument in arguments))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message.replace("{}", str(tmp_path)) in line
    assert not (tmp_path / "out").exists()
