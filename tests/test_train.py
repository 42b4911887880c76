"""The training program on the toy flow: its record, its resumption after every kind of end, its refusals."""

import base64
import contextlib
import dataclasses
import gc
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.errors import UserError
from egrpo_jax.common.offload import HOST
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.rewards import RewardError
from egrpo_jax.run.checkpoint import Checkpoints
from egrpo_jax.run.metrics import read_metrics
from egrpo_jax.run.profile import Window
from egrpo_jax.training import job
from egrpo_jax.training import loop as program
from egrpo_jax.training.config import RewardsConfig, TrainConfig
from egrpo_jax.training.iteration import MissingScoreError, NotFiniteError
from egrpo_jax.training.job import make_job
from egrpo_jax.training.state import save, start_or_resume
from tests import fault_server, programs, toy

ITERATIONS = 12
TIMED = ("seconds/", "images_per_second", "compilations")
ONE_CALL = {"evaluation.every": 100, "evaluation.batch": 200}
"""Evaluations that call a reward once."""


def config(variant="", **changes):
    config = toy.get_config(variant)
    config.update_from_flattened_dict(changes)
    return from_config_dict(TrainConfig, config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a run of tests/toy.py:slow that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("finished")
    done = programs.run("train", "--config", "tests/toy.py:slow", "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def final_state(workdir):
    """{path: array} of the last checkpoint: parameters, optimizer state, average, key."""
    state = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(ITERATIONS) / "state")
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def untimed_metrics(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith(TIMED)} for line in lines]


def assert_same_end(workdir, reference):
    state, expected = final_state(workdir), final_state(reference)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)
    assert untimed_metrics(workdir) == untimed_metrics(reference)


def test_what_a_run_leaves(finished):
    lines = read_metrics(finished / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == list(range(ITERATIONS + 1))
    expected = {
        *("loss", "ratio/mean", "ratio/max_deviation", "ratio/on_policy_deviation", "clip/high", "clip/low", "kl"),
        *("advantage/std", "advantage/max", "grad_norm", "update_norm", "learning_rate", "skipped_updates"),
        *("seconds/rollout", "seconds/decode", "seconds/reward", "seconds/update", "images_per_second"),
        *("compilations", "seconds/compile"),
        "reward/tests.toy:brightness/mean",
        *(f"reward/tests.toy:slow_brightness/{what}" for what in ("mean", "std", "std_step_0", "std_step_1")),
    }
    assert all(expected <= line.keys() for line in lines[1:])
    assert all(line["ratio/on_policy_deviation"] <= 1e-6 for line in lines[1:])
    assert all(0 <= line["ratio/rollout_deviation"] <= 1e-6 for line in lines[1:])
    assert lines[1]["compilations"] > 3
    assert all(line["compilations"] == 0 for line in lines[2:])
    evaluated = [line["iteration"] for line in lines if "eval/tests.toy:brightness/mean" in line]
    assert evaluated == [0, 4, 8, 12]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["12", "9"]
    assert list((finished / "tb").glob("events.*"))
    for name in ("reward_curve.png", "entropy.png", "before_after.png", "eval/000000.png", "eval/000012.png"):
        with Image.open(finished / name) as image:
            assert min(image.size) > 100


def test_the_reward_rises(finished):
    first, *_, last = read_metrics(finished / "metrics.jsonl")
    name = "eval/tests.toy:slow_brightness"
    assert last[f"{name}/change"] > last[f"{name}/change_ci95"] > 0
    assert last[f"{name}/mean"] > first[f"{name}/mean"]


def test_a_finished_run_reports_again_and_changes_nothing(finished, capsys):
    before = (finished / "metrics.jsonl").read_text(), final_state(finished)
    assert program.train(config("slow"), finished) is None
    assert "evaluation prompts" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_text() == before[0]
    np.testing.assert_equal(final_state(finished), before[1])


def test_a_profile_knows_the_steps_of_the_method_by_name(tmp_path):
    changed = config(num_iterations=2)
    with pytest.raises(UserError, match="--profile: found 2:3, expected iterations from 1 to 2"):
        program.train(changed, tmp_path, profile=Window(2, 3))
    program.train(changed, tmp_path, profile=Window(2, 2))
    (path,) = tmp_path.glob("tb/plugins/profile/*/*.xplane.pb")
    content = path.read_bytes()
    names = (b"anchors/", b"branches/", b"tails/", b"gradient/", b"optimizer/", b"rollout", b"decode", b"reward")
    assert all(name in content for name in names)


def wait_for(condition, process):
    """True once `condition` holds, False if the process ends first."""
    while not condition():
        if process.poll() is not None:
            return False
    return True


def lines_written(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def a_save_is_running(workdir):
    return any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def run_and_kill(workdir, condition):
    process = programs.start("train", "--config", "tests/toy.py:slow", "--workdir", workdir)
    killed = wait_for(condition, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return killed


@pytest.mark.slow
def test_killed_at_any_moment_a_run_ends_as_if_it_never_was(finished, tmp_path):
    moments = random.Random(0)
    delay, line = moments.uniform(0.5, 4.0), moments.randint(3, ITERATIONS - 1)
    begin = time.monotonic()
    run_and_kill(tmp_path, lambda: time.monotonic() > begin + delay)
    assert run_and_kill(tmp_path, lambda: lines_written(tmp_path) >= 3)
    assert run_and_kill(tmp_path, lambda: a_save_is_running(tmp_path))
    assert run_and_kill(tmp_path, lambda: lines_written(tmp_path) > line)
    assert run_and_kill(tmp_path, lambda: lines_written(tmp_path) > 9 and a_save_is_running(tmp_path))
    done = programs.run("train", "--config", "tests/toy.py:slow", "--workdir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_end(tmp_path, finished)


@pytest.mark.parametrize(("number", "line"), [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "terminated\n")])
def test_a_signal_before_the_first_iteration_ends_the_run_at_once(tmp_path, number, line):
    command = programs.command("train", "--config", "tests/toy.py:slow", "--workdir", tmp_path)
    quiet, pipe = subprocess.DEVNULL, subprocess.PIPE
    process = subprocess.Popen(command, cwd=programs.ROOT, stdout=quiet, stderr=pipe, text=True)
    assert wait_for(lambda: (tmp_path / ".lock").exists(), process)
    process.send_signal(number)
    assert process.communicate()[1] == line
    assert process.returncode == 128 + number
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {".lock", "config.json"}


class Signals:
    """`brightness`, and Ctrl-C so many times in the fifth iteration, after two tries and an evaluation."""

    def __init__(self, times):
        self.calls, self.times = 0, times

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls == 8:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60 if self.times > 1 else 0.2)
        return toy.brightness(images, prompts)


def test_ctrl_c_saves_at_the_end_of_the_iteration_and_says_so_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "slow_brightness", Signals(1))
    assert program.train(config("slow", **ONE_CALL), tmp_path) == signal.SIGINT
    assert "saving after this iteration; once more to stop at once\n" in capsys.readouterr().err
    assert saved(tmp_path) == ["3", "5"]
    assert program.train(config("slow", **ONE_CALL), tmp_path) is None
    assert [line["iteration"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(ITERATIONS + 1))


def test_a_second_ctrl_c_stops_at_once_and_the_last_checkpoint_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "slow_brightness", Signals(2))
    with pytest.raises(KeyboardInterrupt):
        program.train(config("slow", **ONE_CALL), tmp_path)
    assert saved(tmp_path) == ["3"]
    assert lines_written(tmp_path) == 5
    assert program.train(config("slow", **ONE_CALL), tmp_path) is None


def saved(workdir):
    """Names of all that lies in the checkpoints' folder."""
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


class Raises:
    """`brightness`, but for one call."""

    def __init__(self, at):
        self.calls, self.at = 0, at

    def __call__(self, images, prompts):
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("out of memory")
        return toy.brightness(images, prompts)


def test_a_reward_that_raises_ends_the_run_with_a_line_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "slow_brightness", Raises(at=8))  # two tries, an evaluation, iteration 5
    arguments = ["--config", "tests/toy.py:slow", "--workdir", tmp_path, "--config.evaluation.every=100"]
    done = programs.call("train", *arguments, "--config.evaluation.batch=200")
    assert done.returncode == 2
    expected = r"error: the reward 'tests\.toy:slow_brightness' raised RuntimeError: out of memory( \(.*\))?"
    assert re.fullmatch(expected, done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    assert saved(tmp_path) == ["3", "4"]
    assert lines_written(tmp_path) == 5


def test_a_reward_that_raises_in_an_evaluation_loses_no_iteration(tmp_path, monkeypatch):
    changed = config("slow", **ONE_CALL | {"evaluation.every": 4})
    monkeypatch.setattr(toy, "slow_brightness", Raises(at=8))  # two tries, an evaluation, iterations 1 to 4
    with pytest.raises(RewardError, match="out of memory"):
        program.train(changed, tmp_path)
    assert saved(tmp_path) == ["3", "4"]
    assert program.train(changed, tmp_path) is None
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3, 4, 4, *range(5, ITERATIONS + 1)]
    evaluated = [line["iteration"] for line in lines if "eval/tests.toy:brightness/mean" in line]
    assert evaluated == [0, 4, 8, 12]


def test_a_save_that_fails_does_not_hide_why_the_run_ended(tmp_path, monkeypatch):
    def full(*_):
        raise UserError("the disk is full")

    monkeypatch.setattr(toy, "slow_brightness", Raises(at=5))
    monkeypatch.setattr(Checkpoints, "save", full)
    with pytest.raises(RewardError, match="out of memory"):
        program.train(config("slow", **ONE_CALL), tmp_path)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(finished, tmp_path):
    process = programs.start("train", "--config", "tests/toy.py:slow", "--workdir", tmp_path)
    assert wait_for(lambda: lines_written(tmp_path) >= 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved == lines_written(tmp_path) - 1 < ITERATIONS
    done = programs.run("train", "--config", "tests/toy.py:slow", "--workdir", tmp_path)
    assert f"resuming from iteration {saved}" in done.stdout
    assert_same_end(tmp_path, finished)


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for path in (workdir / "checkpoints" / str(ITERATIONS) / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert program.train(config("slow"), workdir) is None
    output = capsys.readouterr()
    assert "resuming from iteration 9" in output.out
    (line,) = (line for line in output.err.splitlines() if "damaged" in line)
    assert line.startswith(f"warning: checkpoint {ITERATIONS} is damaged (")
    assert_same_end(workdir, finished)


def test_iterations_without_scores_make_no_update_and_many_end_the_run(tmp_path):
    changes = {"checkpoint.every": 1, "optim.max_skipped": 4, **ONE_CALL}
    # Two tries on grey images, the evaluation before the first iteration and four iterations are good.
    toy.breaks_after_five.calls = 7
    with pytest.raises(NotFiniteError, match=r"4 updates in a row had no group with all of its scores"):
        program.train(config("breaks", **changes), tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line.get("skipped_updates") for line in lines[1:]] == [0, 0, 0, 0, 2, 4]
    newest = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert newest == 5
    state = ocp.StandardCheckpointer().restore(tmp_path / "checkpoints" / str(newest) / "state")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["state"]["params"]))
    # Mended, the run goes on.
    toy.breaks_after_five.calls = 100
    assert program.train(config("breaks", **changes), tmp_path) is None
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["skipped_updates"] == 2


def test_rollouts_of_fewer_prompts_give_the_same_run(tmp_path):
    changes = {"num_iterations": 2, "rewards.heldout": ("tests.toy:redness",)}
    records = []
    for at_once in (None, 2):
        workdir = tmp_path / str(at_once)
        program.train(config("slow", prompts_per_rollout=at_once, **changes), workdir)
        records.append(untimed_metrics(workdir)[1:])
    for whole, parts in zip(*records, strict=True):
        assert whole.keys() == parts.keys()
        np.testing.assert_allclose([parts[name] for name in whole], list(whole.values()), rtol=1e-3, atol=1e-6)


def test_a_reward_in_the_background_is_waited_for_after_the_last_rollout(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "unreliable", reward := toy.Unreliable())
    changes = {"num_iterations": 1, "prompts_per_rollout": 4, **ONE_CALL}
    program.train(config("unreliable", **changes), tmp_path)
    tries, evaluation, iteration = reward.log[:4], reward.log[4:6], reward.log[6:10]
    assert tries == [("handed in", 0), ("waited for", 0), ("handed in", 1), ("waited for", 1)]
    assert evaluation == [("handed in", 2), ("waited for", 2)]
    assert iteration == [("handed in", 3), ("handed in", 4), ("waited for", 3), ("waited for", 4)]


def test_a_group_without_a_score_is_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "unreliable", toy.Unreliable(fails=(4,)))
    program.train(config("unreliable", num_iterations=3, **ONE_CALL), tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")[1:]
    assert [line["groups_left_out"] for line in lines] == [0, 1, 0]
    assert [line["reward/tests.toy:unreliable/missing"] for line in lines] == [0, 1, 0]
    assert all(np.isfinite(line["loss"]) and line["skipped_updates"] == 0 for line in lines)
    assert all(np.isfinite(line["reward/tests.toy:unreliable/mean"]) for line in lines)


def test_a_missing_score_ends_the_run_if_told_so_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "unreliable", toy.Unreliable(fails=(5,)))
    changed = config("unreliable", num_iterations=4, **ONE_CALL, **{"rewards.on_missing": "fail"})
    with pytest.raises(MissingScoreError, match=r"iteration 3: scores never came: 1 of tests\.toy:unreliable"):
        program.train(changed, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert program.train(changed, tmp_path) is None
    assert [line["iteration"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def brightness(handler, request):
    """A server's answer: the mean of each image."""
    files = [io.BytesIO(base64.b64decode(image)) for image in request["images"]]
    fault_server.reply(handler, {"scores": [float(np.asarray(Image.open(file)).mean() / 255) for file in files]})


def test_a_server_that_is_down_for_a_while_costs_groups_and_not_the_run(tmp_path):
    down, partly = fault_server.says({}, 503), fault_server.says({"scores": [1.0] * 3 + [None] + [1.0] * 60})
    # Scored at once: 8 prompts, 2 active steps, 4 samples; 8 evaluation prompts before.
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {'x' * i}" for i in range(8)))
    with fault_server.FaultServer(brightness, brightness, down, partly, brightness) as server:
        remote = {"url": server.url, "batch": 64, "retries": 0}
        changes = {"num_iterations": 4, "evaluation.every": 100, "rewards.train": ("judge",)}
        workdir, prompts = tmp_path / "run", str(tmp_path / "prompts.txt")
        changed = config(**changes, **{"evaluation.prompts": prompts, "scorers.remote": {"judge": remote}})
        assert program.train(changed, workdir) is None
    first, *lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["groups_left_out"] for line in lines] == [0, 16, 1, 0]
    assert [line["reward/judge/missing"] for line in lines] == [0, 64, 1, 0]
    # Nothing to learn from: neither of the two updates is made.
    assert [line["skipped_updates"] for line in lines] == [0, 2, 2, 2]
    assert lines[-1]["eval/judge/mean"] == pytest.approx(lines[-1]["eval/tests.toy:brightness/mean"], abs=1 / 255)
    assert first["eval/judge/missing"] == 0


@pytest.mark.parametrize("role", ["train", "heldout"])
def test_a_reward_that_scores_nothing_is_found_before_the_first_iteration(tmp_path, role):
    changed = config(**{f"rewards.{role}": ("tests.rewards.own:nan_always",)})
    with pytest.raises(UserError, match=r"'tests\.rewards\.own:nan_always' scored none of the 200 evaluation images"):
        program.train(changed, tmp_path)
    assert not (tmp_path / "eval").exists()
    assert program.train(config(num_iterations=1), tmp_path) is None  # mended, in the same place


def test_what_is_wrong_with_rewards_is_said_before_anything_is_loaded():
    for changes, message in (
        ({"rewards.clips": (1.0, 2.0)}, r"config\.rewards\.clips: found \(1\.0, 2\.0\)"),
        ({"rewards.clips": (1.0,), "rewards.combination": "sum"}, "'sum' normalises no reward by itself"),
        ({"rewards.combination": "product"}, "one of 'advantages', 'sum', 'decoupled'"),
        ({"prompts_per_rollout": 3}, "prompts_per_rollout: found 3, expected a divisor of prompts_per_iteration, 8"),
    ):
        with pytest.raises(UserError, match=message):
            config(**changes)


def test_updates_that_would_break_the_parameters_end_the_run_and_the_last_good_ones_are_kept(tmp_path, monkeypatch):
    made = job.make_optimizer

    def breaks(config):
        """Gradients stay finite, updates do not, from the second iteration on."""
        optimizer = made(config)

        def update(grads, state, params):
            updates, new = optimizer.update(grads, state, params)
            return optax.tree.scale(jnp.where(new[1].count > 2, jnp.inf, 1.0), updates), new

        return optax.GradientTransformation(optimizer.init, update)

    monkeypatch.setattr(job, "make_optimizer", breaks)
    changes = {"checkpoint.every": 1, "optim.max_skipped": 4, "evaluation.every": 100}
    with pytest.raises(NotFiniteError, match=r"iteration 3: 4 updates in a row had a loss or parameters that are not "):
        program.train(config(**changes), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]


def diverging(_):
    """The toy pipeline, whose images are nan once a parameter has moved."""
    pipeline = toy.pipeline(None)
    start = toy.params(width=12)["mix"]

    def decode(params, latents):
        return jnp.where((params["mix"] == start).all(), pipeline.decode(params, latents), jnp.nan)

    return dataclasses.replace(pipeline, decode=decode)


def test_a_diverged_policy_stops_the_run_and_does_not_look_like_a_lost_server(tmp_path):
    changes = {"model.name": "tests.test_train:diverging", "evaluation.every": 100}
    with pytest.raises(NotFiniteError, match="iteration 2: none of its 64 images is finite"):
        program.train(config(**changes, **{"rewards.on_missing": "fail"}), tmp_path)


def partly_broken(_):
    """The toy pipeline, whose images are nan where their first latent is above one."""
    pipeline = toy.pipeline(None)

    def decode(params, latents):
        broken = latents[:, :1, :1, None] > 1
        return jnp.where(broken, jnp.nan, pipeline.decode(params, latents))

    return dataclasses.replace(pipeline, decode=decode)


def test_images_that_are_not_finite_are_counted_and_are_no_missing_scores(tmp_path):
    changes = {"model.name": "tests.test_train:partly_broken", "num_iterations": 2, "rewards.on_missing": "fail"}
    assert program.train(config(**changes), tmp_path) is None
    lines = read_metrics(tmp_path / "metrics.jsonl")[1:]
    assert all(0 < line["images_not_finite"] < 64 for line in lines)
    assert all(line["groups_left_out"] > 0 for line in lines)
    assert {line["reward/tests.toy:redness/missing"] for line in lines} == {0}
    assert all(np.isfinite(line["reward/tests.toy:redness/mean"]) for line in lines)


def test_prompts_that_changed_under_the_same_name_are_noticed(tmp_path):
    prompts, judged = tmp_path / "prompts.txt", tmp_path / "judged.txt"
    prompts.write_text("one\ntwo\nthree\n")
    judged.write_text("four\nfive\n")
    changes = {"prompts": str(prompts), "evaluation.prompts": str(judged), "num_iterations": 1}
    assert program.train(config(**changes), tmp_path / "run") is None
    prompts.write_text("one\ntwo\nthrees\n")
    with pytest.raises(UserError, match=r"prompts\.txt' are not those that the run was saved with"):
        program.train(config(**changes), tmp_path / "run")
    assert program.train(config(**changes), tmp_path / "run", allow_config_change=True) is None
    judged.write_text("four\nfives\n")
    with pytest.raises(UserError, match=r"000000\.npz is of other prompts"):
        program.train(config(**changes), tmp_path / "run", allow_config_change=True)


def test_two_runs_in_one_workdir(tmp_path):
    process = programs.start("train", "--config", "tests/toy.py:slow", "--workdir", tmp_path)
    try:
        assert wait_for(lambda: (tmp_path / "config.json").exists(), process)
        with pytest.raises(UserError, match=rf"the workdir .* is in use by process {process.pid} on "):
            program.train(config("slow"), tmp_path)
    finally:
        process.kill()
        process.wait()


def test_a_resumed_run_of_the_embedded_model_holds_its_state_once(tmp_path):
    """Live bytes after a resume: what training changes, the rest of the parameters, nothing twice."""
    changed = TrainConfig(rewards=RewardsConfig(train=("tests.toy:brightness",)))
    mesh = make_mesh(changed.mesh)

    def alive(before):
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)

    with jax.set_mesh(mesh), contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        made = make_job(changed, mesh)
        gc.collect()
        before = {id(array): array for array in jax.live_arrays()}
        for iteration in (0, 3):
            progress, frozen = start_or_resume(made, checkpoints, mesh)
            assert progress.iteration == iteration
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves((progress.state, frozen)))
            assert 20e6 < needed <= alive(before) <= needed + 100  # a key or two
            save(checkpoints, progress._replace(iteration=3), made)
            del progress, frozen
            checkpoints.wait()


def test_moments_that_rest_on_the_host_change_nothing_but_where_they_are(finished, tmp_path):
    resting = config("slow", **ONE_CALL, **{"optim.offload": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "slow_brightness", Signals(1))
        assert program.train(resting, tmp_path) == signal.SIGINT
    mesh = make_mesh(resting.mesh)
    with jax.set_mesh(mesh), contextlib.closing(Checkpoints(tmp_path / "checkpoints")) as checkpoints:
        progress, _ = start_or_resume(make_job(resting, mesh), checkpoints, mesh)
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(progress.state.opt_state) if leaf.ndim} == {HOST}
    assert program.train(resting, tmp_path) is None
    state, expected = final_state(tmp_path), final_state(finished)
    for name, value in expected.items():
        np.testing.assert_allclose(state[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    # And such a checkpoint is read by a run whose moments are on the devices.
    usual = config("slow", **ONE_CALL, num_iterations=13)
    assert program.train(usual, tmp_path, allow_config_change=True) is None


@pytest.mark.parametrize("variant", ["mix_grpo", "diffusion_nft", "ada_grpo", "adaptive"])
def test_resumed_within_a_moving_schedule_a_run_ends_as_if_never_stopped(tmp_path, variant):
    """Its window moves in every iteration; a trailing copy, whose decay rises, makes the samples; a running mean
    chooses the prompts; noise follows the rewards."""
    for name, parts in (("whole", (4,)), ("parted", (2, 4))):
        for iterations in parts:
            moving = config(variant, **ONE_CALL, num_iterations=iterations)
            assert program.train(moving, tmp_path / name, allow_config_change=True) is None
    states = []
    for name in ("whole", "parted"):
        saved = ocp.StandardCheckpointer().restore(tmp_path / name / "checkpoints" / "4" / "state")
        states.append({jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_leaves_with_path(saved)})
    assert states[0].keys() == states[1].keys()
    assert variant != "diffusion_nft" or any("trailing" in name for name in states[0])
    for name, value in states[0].items():
        np.testing.assert_array_equal(states[1][name], value, err_msg=name)
    whole, parted = (untimed_metrics(tmp_path / name) for name in ("whole", "parted"))
    trained = lambda lines: [{k: v for k, v in line.items() if not k.startswith("eval")} for line in lines]
    assert trained(whole) == trained(parted)
    if variant == "adaptive":
        noises = [[line[f"noise/step_{step}"] for step in (0, 1)] for line in whole[1:]]
        assert noises[0] == noises[1] != noises[2] == noises[3]
        lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
        assert all(line["compilations"] == 0 for line in lines[2:])
        assert (tmp_path / "whole" / "noise.png").stat().st_size > 10_000


def test_another_config_is_refused_unless_told(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    changed = config("slow", **{"optim.learning_rate": 1e-5})
    with pytest.raises(UserError, match=r"optim\.learning_rate was 0\.003, now 1e-05.*--allow_config_change"):
        program.train(changed, workdir)
    assert program.train(changed, workdir, allow_config_change=True) is None
    assert json.loads((workdir / "config.json").read_text())["optim"]["learning_rate"] == 1e-5


def test_a_change_that_is_refused_in_the_end_leaves_the_record(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match="is a checkpoint of another model"):
        program.train(config("slow", **{"learner.ema_decay": None}), workdir, allow_config_change=True)
    assert (workdir / "config.json").read_text() == before


def test_rewards_must_be_there(tmp_path):
    with pytest.raises(UserError, match=r"config\.rewards\.train"):
        config(**{"rewards.train": (), "rewards.weights": ()})
    with pytest.raises(UserError, match=r"'tests\.toy:nothing'"):
        program.train(config(**{"rewards.train": ("tests.toy:nothing",)}), tmp_path)


@pytest.fixture
def files(tmp_path):
    """Things to name in bad commands."""
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\x89PNG\x00")
    (tmp_path / "file").write_text("")
    (tmp_path / "config.py").write_text("def get_config():\n    raise RuntimeError('broken')\n")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"seed": 1}')
    (other / "checkpoints" / "3").mkdir(parents=True)
    return tmp_path


BAD_INPUT = {
    "unknown key": (["--config.plan.nose_level=1"], "config.plan.nose_level: found 1, expected one of EGrpo's keys"),
    "wrong type": (["--config.plan.num_steps=many"], "num_steps"),
    "threshold with a list": (
        ["--config.plan.merges=(1, 1, 1, 1)"],
        "config.plan.merges: found (1, 1, 1, 1), expected",
    ),
    "active step": (["--config.plan.active_steps=(0, 8)"], "config.plan.active_steps: found 8, expected a grid step"),
    "group of one": (["--config.plan.group_size=1"], "config.plan.group_size: found 1, expected a whole number from 2"),
    "empty prompts": (["--config.prompts={}/empty.txt"], "empty.txt: found no prompt"),
    "binary prompts": (["--config.prompts={}/binary.txt"], "binary.txt: line 1: byte 0 is not UTF-8"),
    "unwritable workdir": (["--workdir={}/file/run"], "cannot lock the workdir {}/file/run: Not a directory"),
    "another config": (["--workdir={}/other"], "{}/other was made with another config"),
    "missing asset": (["--config.model.path={}/flow.safetensors"], "{}/flow.safetensors is missing"),
    "unknown reward": (["--config.rewards.train=('beauty',)"], "unknown reward 'beauty'; use one of emoji,"),
    "unknown variant": (["--config=configs/emoji.py:harder"], "'harder'"),
    "broken config file": (["--config={}/config.py"], "broken"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(files, case):
    arguments, message = BAD_INPUT[case]
    workdir = files / "run"
    arguments = [argument.replace("{}", str(files)) for argument in arguments]
    done = programs.run("train", "--config=configs/emoji.py", f"--workdir={workdir}", *arguments)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message.replace("{}", str(files)) in line
    assert not (workdir / "checkpoints").exists()


def test_a_merge_past_the_end():
    changes = {"plan.entropy_threshold": None, "plan.active_steps": (0, 2), "plan.merges": (1, 3)}
    with pytest.raises(UserError, match=r"config\.plan\.merges: found 3, expected 1 to 2 at step 2: the grid ends"):
        config(**changes)
