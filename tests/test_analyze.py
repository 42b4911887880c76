"""The program that measures random steps and recommends a schedule."""

import json
import os
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from tests import programs, tiny_flux, toy

SMALL = ("--prompts=2", "--pairs=3", "--replicates=3", "--tail_replicates=1")


def gappy(images, prompts):
    """No score for the brightest half."""
    scores = np.array(toy.brightness(images, prompts))
    return np.where(scores > np.median(scores), np.nan, scores)


def analyze(*arguments):
    return programs.call("analyze", *arguments)


@pytest.fixture(scope="module")
def analysis(tmp_path_factory):
    out = tmp_path_factory.mktemp("analyze") / "out"
    done = analyze("--config=tests/toy.py", f"--out={out}", *SMALL)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_what_is_written(analysis):
    out, printed = analysis
    assert {path.name for path in out.iterdir()} == {"analysis.md", "analysis.json", "analysis.png"}
    page, record = (out / "analysis.md").read_text(), json.loads((out / "analysis.json").read_text())
    assert printed.startswith(page)
    assert re.search(r"\*\*Active steps: [\d, ]+\*\* of flow_sde", page)
    assert [form["name"] for form in record["forms"]] == ["flow_sde, noise level 0.7", "exact_sde, noise by τ = 2.2"]
    steps = record["forms"][0]["steps"]
    assert [step["branch"]["step"] for step in steps if step["branch"]["stop"] == step["branch"]["step"] + 1] == [
        0,
        1,
        2,
    ]
    assert set(steps[0]["rewards"]) == {"tests.toy:redness"}
    assert set(steps[0]["rewards"]["tests.toy:redness"]["correlations"]) == {"tests.toy:brightness"}
    assert record["protocol"]["sizes"] == {"prompts": 2, "pairs": 3, "replicates": 3, "tail_replicates": 1}
    with Image.open(out / "analysis.png") as picture:
        assert picture.width > 1000


def test_it_is_deterministic_and_prompts_may_come_one_by_one(analysis, tmp_path):
    out, _ = analysis
    again = analyze("--config=tests/toy.py", f"--out={tmp_path / 'again'}", *SMALL)
    assert again.returncode == 0
    for name in ("analysis.md", "analysis.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    one_by_one = analyze("--config=tests/toy.py", f"--out={tmp_path / 'one'}", "--batch=1", *SMALL)
    assert one_by_one.returncode == 0
    spreads = [
        [
            step["rewards"]["tests.toy:redness"]["spread"]["value"]
            for step in json.loads(path.read_text())["forms"][0]["steps"]
        ]
        for path in (out / "analysis.json", tmp_path / "one" / "analysis.json")
    ]
    assert spreads[0] == pytest.approx(spreads[1], abs=1e-5)


def test_the_weights_of_a_run(tmp_path):
    workdir = tmp_path / "run"
    assert (
        programs.call("train", "--config=tests/toy.py", "--config.num_iterations=1", f"--workdir={workdir}").returncode
        == 0
    )
    done = analyze(f"--workdir={workdir}", f"--out={tmp_path / 'out'}", "--steps=0,2", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "weights of the run run, iteration 1" in done.stdout
    assert "| base weights | 100% |" in done.stdout
    assert json.loads((tmp_path / "out" / "analysis.json").read_text())["forms"][0]["steps"][-1]["branch"]["step"] == 2


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize("config", ["tests/toy.py", "flux"])
def test_it_does_not_depend_on_the_devices(tmp_path, config):
    if config == "flux":
        config = f"tests/tiny_flux.py:{tiny_flux.write_pipeline(tmp_path / 'pipeline')}"
    records = []
    for devices, mesh in ((1, ()), (4, ("--config.mesh.data=2", "--config.mesh.fsdp=2"))):
        words = programs.command("analyze", f"--config={config}", f"--out={tmp_path / str(devices)}", *mesh, *SMALL)
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
        done = subprocess.run(words, cwd=programs.ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        records.append(json.loads((tmp_path / str(devices) / "analysis.json").read_text())["forms"])
    for one, several in zip(*records, strict=True):
        for step, same in zip(one["steps"], several["steps"], strict=True):
            numbers = [
                [each["gradient"]["norm"], each["distance"], each["attention"] or 0.0]
                + [reward["spread"]["value"] for reward in each["rewards"].values()]
                for each in (step, same)
            ]
            assert numbers[1] == pytest.approx(numbers[0], rel=1e-3)
            assert same["gradient"]["ratio"]["value"] == pytest.approx(step["gradient"]["ratio"]["value"], abs=1e-2)


def test_scores_that_never_come_end_it(tmp_path):
    done = analyze(
        "--config=tests/toy.py",
        "--config.rewards.train=('tests.test_analyze:gappy',)",
        f"--out={tmp_path / 'out'}",
        *SMALL,
    )
    assert done.returncode == 2
    line = r"error: the reward 'tests.test_analyze:gappy' scored all but \d+ of \d+ images, expected finite numbers: .*"
    assert re.fullmatch(line, done.stderr.splitlines()[-1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--steps=0,3"], "--steps: found 0,3, expected grid steps from 0 to 2"),
        (["--steps=first"], "--steps: found first, expected whole numbers, separated by commas"),
        (["--batch=3"], "--batch: found 3, expected a divisor of --prompts, 8"),
        (["--tail_replicates=11"], "--tail_replicates: found 11, expected at most --replicates, 10"),
        (["--replicates=2"], "flag --replicates=2: .*"),
        (["--config.plan.active_steps=(7,)"], r"config.plan.active_steps: found 7, expected a grid step from 0 to 3"),
        (
            ["--config.plan={'algorithm': 'awm'}"],
            "config.plan.algorithm: found 'awm', expected an algorithm with random steps, which are what is analysed",
        ),
        (["--out=tests"], "tests exists; name a new folder, or remove it"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, line):
    done = analyze("--config=tests/toy.py", f"--out={tmp_path / 'out'}", *arguments)
    assert done.returncode == 2
    assert re.fullmatch(f"error: {line}\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()
