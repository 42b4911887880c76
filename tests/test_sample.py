"""The program `sample`, from the assets and from a run's workdir, on the embedded model."""

import numpy as np
import pytest
from PIL import Image

from tests import programs

PROMPTS = "--prompts=red heart,cat face"


def sheet(tmp_path, name, *arguments):
    out = tmp_path / name
    done = programs.run("sample", "--config=configs/emoji.py", PROMPTS, f"--out={out}", *arguments)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image:
        return np.asarray(image), done.stdout


@pytest.mark.slow
def test_a_sheet_from_the_assets_and_from_a_run(tmp_path):
    first, printed = sheet(tmp_path, "a.png")
    assert "2 images from the config's weights" in printed
    again, _ = sheet(tmp_path, "b.png")
    other, _ = sheet(tmp_path, "c.png", "--seed=1")
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()

    (tmp_path / "prompts.txt").write_text("red heart\ncat face\n")
    small = ["--config.num_iterations=1", "--config.prompts_per_iteration=2", "--config.plan.num_steps=4"]
    small += [f"--config.evaluation.prompts={tmp_path}/prompts.txt", "--config.rewards.heldout=()"]
    workdir = tmp_path / "run"
    done = programs.run("train", "--config=configs/emoji.py", f"--workdir={workdir}", *small)
    assert done.returncode == 0, done.stderr
    trained, printed = sheet(tmp_path, "d.png", f"--workdir={workdir}")
    assert f"2 images from {workdir}, iteration 1" in printed
    assert trained.shape == first.shape
    assert (trained != first).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([PROMPTS, "--workdir={}/nothing"], "found no checkpoints in {}/nothing"),
        (["--prompts= ,"], "expected at least one prompt"),
        ([PROMPTS, "--out={}/file/x.png"], "cannot write {}/file/x.png"),
        ([PROMPTS, "--seed=-1"], "--seed"),
    ],
)
def test_bad_input(tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    arguments = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    done = programs.run("sample", "--config=configs/emoji.py", f"--out={tmp_path}/x.png", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message.replace("{}", str(tmp_path)) in line
