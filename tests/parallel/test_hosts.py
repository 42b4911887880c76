"""A run in two processes with four devices each: the same as in one, through signals, kills, damage and mistakes."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.lock import owned
from egrpo_jax.parallel import hosts
from egrpo_jax.run.metrics import read_metrics
from tests import programs
from tests.parallel.test_mesh import assert_same, run

PACKAGE = Path(hosts.__file__).parent.parent
ITERATIONS = 8
PATIENCE = 120
"""Seconds in which a process has noticed that another one is gone."""


def join(port, number, processes=2):
    return [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={number}"]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(command, devices=4):
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(
        command, cwd=programs.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def started(commands):
    """The running processes, none of which outlives the block."""
    processes = [start(command) for command in commands]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finish(commands):
    """(exit code, output, own lines of errors) of each."""
    with started(commands) as processes:
        return [end(process) for process in processes]


def end(process, patience=280):
    output, errors = process.communicate(timeout=patience)
    return process.returncode, output, [line for line in errors.splitlines() if line.startswith("error:")]


def train(workdir, *arguments, config="tests/toy.py:slow"):
    common = [f"--config={config}", f"--workdir={workdir}", f"--config.num_iterations={ITERATIONS}", *arguments]
    port = free_port()
    return [programs.command("train", *common, *join(port, number)) for number in range(2)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a run in two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("hosts") / "finished"
    first, second = finish(train(workdir))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "evaluation prompts" in first[1]
    # The leader speaks; Gloo says how it is connected, from several threads at once.
    assert not [line for line in second[1].splitlines() if line and not re.search("Gloo|peer ranks", line)]
    return workdir


def final_state(workdir):
    """{path: array} of the last checkpoint."""
    path, checkpointer = workdir / "checkpoints" / str(ITERATIONS) / "state", ocp.PyTreeCheckpointer()
    saved = checkpointer.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)  # whatever devices it was on
    state = checkpointer.restore(path, restore_args=as_numpy)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_same_end(workdir, reference):
    state, expected = final_state(workdir), final_state(reference)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, err_msg=name)


def lines_written(workdir):
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def until_under_way(workdir, processes, lines=4):
    while lines_written(workdir) < lines:
        assert all(process.poll() is None for process in processes), [end(process) for process in processes]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize(
    ("config", "axes"), [("tests/toy.py", (8, 1, 1)), ("tests/toy.py", (2, 2, 2)), ("configs/emoji.py", (4, 2, 1))]
)
def test_samples_scores_and_parameters_are_those_of_one_process(tmp_path, config, axes):
    expected, port = run(config, tmp_path / "one.npz", 1, 1, 1), free_port()
    command = [sys.executable, "-m", "tests.parallel.run_iterations", config, tmp_path / "two.npz", *axes]
    ends = finish([[*map(str, [*command, f"127.0.0.1:{port}", 2, number])] for number in range(2)])
    assert [code for code, *_ in ends] == [0, 0], ends
    with np.load(tmp_path / "two.npz") as arrays:
        assert_same(dict(arrays), expected)


@pytest.mark.slow
@pytest.mark.mesh
def test_rows_and_failures():
    port = free_port()
    commands = [[sys.executable, "-m", "tests.parallel.rows", f"127.0.0.1:{port}", "2", str(i)] for i in range(2)]
    with started(commands) as processes:
        for process in processes:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors


@pytest.mark.slow
@pytest.mark.mesh
def test_the_program_makes_the_run_of_one_process(tmp_path, finished):
    done = programs.run(
        "train", "--config=tests/toy.py:slow", f"--workdir={tmp_path}", f"--config.num_iterations={ITERATIONS}"
    )
    assert done.returncode == 0, done.stderr
    assert_same(final_state(finished), final_state(tmp_path))
    for found, expected in zip(*(read_metrics(path / "metrics.jsonl") for path in (finished, tmp_path)), strict=True):
        assert found.keys() == expected.keys()
        for name in found.keys() - {"grad_norm"}:
            if not name.startswith(("seconds/", "images_per_second", "compilations", "ratio/", "clip/")):
                np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)
    for path in sorted((tmp_path / "eval").glob("*.npz")):
        with np.load(path) as expected, np.load(finished / "eval" / path.name) as found:
            assert found.files == expected.files
            np.testing.assert_allclose(
                found["score:tests.toy:brightness"], expected["score:tests.toy:brightness"], atol=1e-5
            )
            assert np.abs(found["images"].astype(int) - expected["images"]).max() <= 1
    # What one wrote the other reads, checksums and all, on another mesh.
    more = ["--config.num_iterations=9", "--allow_config_change"]
    went_on = programs.run("train", "--config=tests/toy.py:slow", f"--workdir={copy(finished, tmp_path / 'a')}", *more)
    assert f"resuming from iteration {ITERATIONS}" in went_on.stdout, went_on.stderr
    assert "damaged" not in went_on.stderr
    ends = finish(train(copy(tmp_path, tmp_path / "b"), *more))
    assert [code for code, *_ in ends] == [0, 0], ends
    assert f"resuming from iteration {ITERATIONS}" in ends[0][1]


def copy(workdir, to):
    shutil.copytree(workdir, to, ignore=shutil.ignore_patterns("a", "b"))
    return to


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize("which", [0, 1])
def test_a_signal_to_one_process_stops_both_at_the_same_iteration(tmp_path, finished, which):
    with started(train(tmp_path)) as processes:
        until_under_way(tmp_path, processes)
        processes[which].send_signal(signal.SIGTERM)
        assert [end(process)[0] for process in processes] == [143, 143]
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved == read_metrics(tmp_path / "metrics.jsonl")[-1]["iteration"] < ITERATIONS
    ends = finish(train(tmp_path))
    assert [code for code, *_ in ends] == [0, 0], ends
    assert f"resuming from iteration {saved}" in ends[0][1]
    assert_same_end(tmp_path, finished)


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_ends_the_other_which_goes_on_when_both_come_back(tmp_path, finished, which):
    with started(train(tmp_path)) as processes:
        until_under_way(tmp_path, processes, lines=5)
        processes[which].kill()
        code, *_ = end(processes[1 - which], PATIENCE)
        assert code not in (0, 2)
    ends = finish(train(tmp_path))
    assert [code for code, *_ in ends] == [0, 0], ends
    assert_same_end(tmp_path, finished)


@pytest.mark.slow
@pytest.mark.mesh
def test_a_damaged_checkpoint_is_moved_aside_once(tmp_path, finished):
    workdir = copy(finished, tmp_path / "run")
    for path in (workdir / "checkpoints" / str(ITERATIONS) / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 300:
            path.write_bytes(path.read_bytes()[:-100])
    ends = finish(train(workdir))
    assert [code for code, *_ in ends] == [0, 0], ends
    assert [path.name for path in (workdir / "checkpoints").glob("damaged*")] == [f"damaged-{ITERATIONS}-0"]
    assert_same_end(workdir, finished)


@pytest.mark.slow
@pytest.mark.mesh
def test_a_reward_that_fails_in_one_process_ends_both_with_its_line(tmp_path):
    reward = "--config.rewards.train=('tests.parallel.rows:FailsLater',)"
    ends = finish(train(tmp_path, reward, "--config.rewards.heldout=()", "--config.evaluation.batch=200"))
    assert [code for code, *_ in ends] == [2, 2], ends
    assert ends[0][2] == ends[1][2]
    assert re.match(r"error: the reward .* raised OSError: no such model here", ends[0][2][0])
    assert any((tmp_path / "checkpoints").iterdir())
    ends = finish(train(tmp_path / "at once", "--config.rewards.train=('tests.parallel.rows:fails_on_the_second',)"))
    assert [(code, lines) for code, _, lines in ends] == [(2, ends[0][2])] * 2
    assert not (tmp_path / "at once").exists()


@pytest.mark.slow
@pytest.mark.mesh
def test_a_workdir_in_use_and_another_config_are_refused_by_both(tmp_path):
    with owned(tmp_path, "the workdir"):
        ends = finish(train(tmp_path))
    assert [code for code, *_ in ends] == [2, 2], ends
    assert ends[0][2] == ends[1][2]
    assert f"the workdir {tmp_path} is in use by process {os.getpid()} on " in ends[0][2][0]
    commands = train(tmp_path)
    commands[1].append("--config.seed=5")
    assert [end[2] for end in finish(commands)] == [
        ["error: the processes have not the same config and workdir; start all with the same command"]
    ] * 2


def test_a_start_without_the_others_is_one_line():
    begin = "from egrpo_jax.parallel import hosts; hosts.START_TIMEOUT = 2; hosts.start"
    for number in (0, 1):
        process = start([sys.executable, "-c", f"{begin}('127.0.0.1:{free_port()}', 2, {number})"])
        code, _, lines = end(process, 60)
        assert code == 1
        assert re.fullmatch(r"error: not all processes met 127.* within 2 s; see that .*", lines[0])


def test_a_port_in_use_is_one_line():
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = programs.run("train", "--config=tests/toy.py", "--workdir=nowhere", *join(port, 0))
    assert done.returncode == 2
    assert (
        done.stderr
        == f"error: --coordinator: cannot listen at port {port}: Address already in use; choose a free one\n"
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (join(4000, 0)[:2], "expected --process_id too: all of --coordinator, --num_processes, --process_id, or none"),
        (join(4000, 0)[1:], "expected --coordinator too"),
        (join(4000, 2), "--process_id: found 2, expected 0 to 1, as there are 2 processes"),
        (join("x", 0), "--coordinator: found '127.0.0.1:x', expected HOST:PORT of the process 0"),
        (join(70000, 0), "--coordinator: found '127.0.0.1:70000'"),
        (["--coordinator=host", *join(1, 0)[1:]], "--coordinator: found 'host'"),
        (join(4000, 0, processes=0), "num_processes"),
        (join(4000, -1), "process_id"),
    ],
)
def test_wrong_flags(tmp_path, flags, line):
    done = programs.call("train", "--config=tests/toy.py", f"--workdir={tmp_path / 'run'}", *flags)
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "16"}, True),
        ({"SLURM_NTASKS": "16"}, False),  # in the batch script itself, no step of it
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a-0.svc,a-1.svc"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a-0.svc", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_what_the_environment_tells(environment, several):
    assert hosts._has_neighbours({"TPU_SKIP_MDS_QUERY": "1"} | environment) is several


def test_a_tpu_without_names_is_asked(monkeypatch):
    monkeypatch.setattr(hosts.importlib.util, "find_spec", lambda name: name)
    assert hosts._has_neighbours({})
    assert not hosts._has_neighbours({"JAX_PLATFORMS": "cpu"})


def test_alone_nothing_is_asked_or_copied():
    images = jax.numpy.ones((3, 2))
    rows, own = hosts.own_rows(images)
    assert own is images
    assert rows.tolist() == [0, 1, 2]
    tree = {"a": np.ones(2)}
    assert hosts.total(tree) is tree
    assert hosts.total_rows(tree, rows, 3) is tree
    assert hosts.largest(7) == 7
    hosts.require_same("x", "config")
    with pytest.raises(UserError, match="mine"), hosts.together(), hosts.agreed():
        raise UserError("mine")


def test_one_room_knows_of_processes():
    words = re.compile(r"jax\.distributed|process_index|process_count|multihost|is_fully_addressable")
    found = [path.name for path in PACKAGE.rglob("*.py") if words.search(path.read_text())]
    assert found == ["hosts.py"]
