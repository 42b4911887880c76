"""The program that judges a model."""

import contextlib
import hashlib
import json
import math
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from egrpo_jax.common.config import to_config_dict
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.update import init_state
from egrpo_jax.run.checkpoint import Checkpoints
from egrpo_jax.run.workdir import record_config
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import make_job
from egrpo_jax.training.state import Progress, save
from tests import programs


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of the embedded model whose weights have grown by a hundredth, saved as iteration 3."""
    path = tmp_path_factory.mktemp("run")
    config = TrainConfig(learner=LearnerConfig(ema_decay=0.9))  # as configs/emoji.py has it
    job = make_job(config, mesh := make_mesh(config.mesh))
    grown = jax.tree.map(lambda x: x * 1.01, job.pipeline.load(mesh))
    state = init_state(grown, job.optimizer, config.learner)
    with contextlib.closing(Checkpoints(path / "checkpoints")) as checkpoints:
        save(checkpoints, Progress(state, jax.random.key(0), iteration=3, position=0), job)
    record_config(path, to_config_dict(config).to_dict())
    return path


def run(out, *arguments):
    small = ["--steps=2", "--batch=4", "--rewards=emoji,emoji_judge"]
    return programs.call("evaluate", f"--out={out}", *small, *arguments)


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
    with Image.open(tmp_path / "a" / "gains.png") as image:
        assert image.width > 160


def test_one_prompt_has_no_interval(tmp_path, workdir):
    done = run(tmp_path / "out", f"--workdir={workdir}", "--prompt=red heart, or not")
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["protocol"]["prompts"]["source"] == "--prompt"
    for row in table["scores"]:
        assert row["prompts"] == 1
        assert row["change"]["mean"] is not None
        assert (row["change"]["low"], row["change"]["high"]) == (None, None)
    assert " [none] |" in done.stdout


def test_a_reward_that_scores_nothing_is_an_error_and_the_others_are_kept(tmp_path, workdir):
    rewards = "--rewards=emoji,tests.rewards.own:silent"
    done = run(tmp_path / "out", f"--workdir={workdir}", "--prompt=red heart", "--prompt=owl", rewards)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert (
        line
        == f"error: tests.rewards.own:silent: no prompt has all its scores, of 2; {tmp_path / 'out'} has the others"
    )
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["scores"]
    assert [(row["name"], row["prompts"]) for row in rows] == [("emoji", 2), ("tests.rewards.own:silent", 0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rewards=emoji_judge_r1", "--prompt=a fox"], "expected names of emoji as prompts"),
        (["--rewards=tests.rewards.own:scalar"], "'tests.rewards.own:scalar' gave 0.5, expected an array"),
    ],
)
def test_rewards_are_tried_before_anything_is_sampled(tmp_path, arguments, message):
    sampled = mock.patch("egrpo_jax.evaluation.side_by_side.sample_and_score", side_effect=AssertionError)
    with sampled:
        done = run(tmp_path / "out", "--config=configs/emoji.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed=4294967295", "--samples=2"], "--seed=4294967295 --samples=2: the last seed is 4294967295"),
        (["--prompt=a", "--prompt_file=emoji_heldout"], "found both"),
        (["--diversity=emoji_judge"], "--diversity needs at least 2 images of each prompt, found --samples=1"),
        (["--rewards=nothing"], "unknown reward 'nothing'"),
        (["--out={}/file/x"], "cannot write {}/file/x"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    done = run(
        tmp_path / "out",
        "--config=configs/emoji.py",
        *(argument.replace("{}", str(tmp_path)) for argument in arguments),
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message.replace("{}", str(tmp_path)) in line
    assert not (tmp_path / "out").exists()
