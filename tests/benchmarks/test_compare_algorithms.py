"""benchmarks/compare_algorithms.py: what it runs, keeps and shows; and a training of the kind that it starts."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import compare_algorithms as compare
from benchmarks.sweep_results import gain
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.evaluation.side_by_side import Judging, compare_all
from egrpo_jax.evaluation.statistics import as_json
from egrpo_jax.rewards import Scores
from egrpo_jax.rl.algorithms.base import ALGORITHMS
from egrpo_jax.training.config import TrainConfig
from tests import programs

SWEEPS = {name: compare.load_sweep(name) for name in ("algorithms", "factorial", "ablations", "tails")}
CASES = [(name, entry) for name, sweep in SWEEPS.items() if name != "tails" for entry in sweep.entries]


def module(name):
    return compare.runpy.run_path(str(programs.ROOT / "configs" / "sweeps" / f"{name}.py"))


@pytest.mark.parametrize(("name", "entry"), CASES)
def test_all_entries_have_equal_passes(name, entry):
    sweep, cost = module(name), module("algorithms")["cost"]
    config = from_config_dict(TrainConfig, sweep["get_config"](entry))
    spent = sum(cost(config, iteration) for iteration in range(config.num_iterations))
    assert spent <= sweep["BUDGET"] < spent + cost(config, config.num_iterations)
    assert config.prompts_per_iteration == 16
    average = 1 / (1 - config.learner.ema_decay) if config.num_iterations > 10 else 1
    assert average == pytest.approx(max(1, config.num_iterations / 10))
    assert config.rewards.train == ("emoji",)
    assert set(compare.REWARDS) <= {*config.rewards.train, *config.rewards.heldout}
    assert config.num_iterations // config.evaluation.every in range(5, 10)


def test_the_sweeps_are_those_of_the_question():
    assert SWEEPS["algorithms"].entries == tuple(ALGORITHMS)
    kernels = {entry for entry in SWEEPS["factorial"].entries if entry.count("-") == 2}
    assert len(kernels) == 2 * 3 * 2
    assert "adaptive" in SWEEPS["factorial"].entries
    ablations = {*SWEEPS["ablations"].entries}
    assert {f"epochs_{epochs}" for epochs in ("1_mask", "2", "2_mask", "4", "4_mask")} <= ablations
    assert {"egrpo", "tau_1.8", "merge_4", "first_quarter", "last_half", "all_steps"} <= ablations
    assert SWEEPS["ablations"].rates == SWEEPS["tails"].rates == ("2e-4",)
    for name in SWEEPS:
        with pytest.raises(ValueError, match=f"configs/sweeps/{name}.py has the variants"):
            module(name)["get_config"]("another")


def test_tails_are_compared_at_the_papers_setting_and_equal_iterations():
    paper, fast = (from_config_dict(TrainConfig, module("tails")["get_config"](name)) for name in ("paper", "fast"))
    assert (paper.plan.num_steps, paper.plan.group_size, paper.num_iterations) == (16, 12, fast.num_iterations)
    assert paper.plan.make_plan().rollout_passes == 1012
    assert fast.plan.make_plan().rollout_passes == 400
    shipped = from_config_dict(
        TrainConfig, compare.runpy.run_path(str(programs.ROOT / "configs/flux_egrpo_fast.py"))["get_config"]()
    )
    assert fast.plan == shipped.plan
    assert paper.learner == fast.learner


def found(start, end, seconds=10.0, diversity=0.0):
    row = lambda iteration, value: {
        "iteration": iteration, "seconds": seconds * iteration, **dict.fromkeys(compare.REWARDS, value)
    }  # fmt: skip
    return {"evaluations": [row(0, start), row(2, end)], "diversity": diversity}


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    flags = {
        "RUNS": str(tmp_path / "runs"),
        "SEEDS": 2,
        "JOBS": 1,
        "ONLY": None,
        "SWEEP": "small",
        "REPEAT": None,
    }
    for name, value in flags.items():
        monkeypatch.setattr(compare, name, type("Flag", (), {"value": value}))
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    (tmp_path / "algorithms.md").write_text("<!-- small, equal passes -->\nto be filled\n<!-- end -->\n")
    small = compare.Sweep("small", ("good", "bad"), ("1e-5", "1e-4"), lambda _: 2)
    monkeypatch.setattr(compare, "load_sweep", lambda _: small)
    return small


@pytest.mark.usefixtures("sweep")
def test_rates_are_tuned_and_what_is_done_stays(monkeypatch, tmp_path, capsys):
    started = []

    def carry_out(_, run, folder, cores):
        assert (folder / "tuning_judge.txt").exists()
        assert len(cores) >= 1
        started.append(run)
        if len(started) == 8:
            raise KeyboardInterrupt
        good = (run.entry, run.rate) in (("good", "1e-5"), ("bad", "1e-4"))
        return found(0.1, 0.1 + good * (0.2 if run.entry == "good" else 0.1) + 0.01 * run.seed)

    monkeypatch.setattr(compare, "carry_out", carry_out)
    with pytest.raises(KeyboardInterrupt):
        compare.main()
    assert len(json.loads((tmp_path / "small.json").read_text())) >= 6
    compare.main()
    assert {run.name for run in started if run.stage == "final"} == {
        f"{entry}/final/{rate}/{seed}" for entry, rate in (("good", "1e-5"), ("bad", "1e-4")) for seed in (0, 1)
    }
    assert {run.rate for run in started if run.stage == "tune"} == {"5e-6", "1e-5", "1e-4", "2e-4"}
    assert len(started) <= 2 * 3 + 2 * 2 + 1
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].startswith("| good | 1e-5 | 2 | 1.00 | 2 | +0.2050 ± 0.0635 | ")
    assert rows[3].startswith("| bad | 1e-4 |")
    page = (tmp_path / "algorithms.md").read_text().splitlines()
    assert (page[0], page[1:5], page[-1]) == ("<!-- small, equal passes -->", rows[:4], "<!-- end -->")
    for name in ("small.png", "small_gains.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    count = len(started)
    compare.main()
    assert len(started) == count


@pytest.mark.usefixtures("sweep")
def test_runs_of_other_iterations_are_run_again(monkeypatch, tmp_path):
    shorter = {"evaluations": found(0.1, 0.9)["evaluations"][:1]}
    (tmp_path / "small.json").write_text(
        json.dumps(
            dict.fromkeys(("bad/tune/1e-5/100", "gone/tune/1e-5/100"), found(0.1, 0.2))
            | {"good/tune/1e-5/100": shorter}
        )
    )
    started = []
    monkeypatch.setattr(compare, "carry_out", lambda _, run, *__: started.append(run.name) or found(0.1, 0.1))
    compare.main()
    assert "good/tune/1e-5/100" in started
    assert "bad/tune/1e-5/100" not in started


def test_a_sweep_of_one_rate_is_not_tuned(monkeypatch, sweep, tmp_path, capsys):
    monkeypatch.setattr(compare, "load_sweep", lambda _: sweep._replace(rates=("1e-5",)))
    monkeypatch.setattr(compare, "carry_out", lambda _, run, *__: found(0.1, 0.2 + 0.01 * run.seed))
    compare.main()
    runs = {compare.Run.of(name) for name in json.loads((tmp_path / "small.json").read_text())}
    assert {(run.stage, run.rate) for run in runs} == {("final", "1e-5")}
    assert "| good | 1e-5 | 2 | 1.00 | 2 | +0.1050 ± " in capsys.readouterr().out


def test_a_run_is_repeated(monkeypatch, sweep, capsys):
    results = {"good/final/1e-5/0": found(0.1, 0.2)}
    with pytest.raises(compare.UserError, match=r"--repeat: found 'good/final/1e-4/0', .* of small.json"):
        compare.repeat(sweep, "good/final/1e-4/0", results)
    monkeypatch.setattr(compare, "carry_out", lambda *_: found(0.1, 0.209))
    compare.repeat(sweep, "good/final/1e-5/0", results)
    assert "emoji_judge: [0.1   0.209], in the results [0.1 0.2]" in capsys.readouterr().out
    monkeypatch.setattr(compare, "carry_out", lambda *_: found(0.1, 0.211))
    with pytest.raises(compare.UserError, match="--repeat: emoji of good/final/1e-5/0 is not what the results say"):
        compare.repeat(sweep, "good/final/1e-5/0", results)


def test_tuning_trains_and_judges_on_other_prompts(tmp_path):
    train, judge = compare.split_prompts(tmp_path)
    train, judge = train.read_text().splitlines(), judge.read_text().splitlines()
    assert not set(train) & set(judge)
    assert sorted(train + judge) == sorted(compare.read_prompts("emoji_train"))
    assert len(judge) == pytest.approx(len(train) / 4, rel=0.05)


def test_diversity_is_found_among_what_evaluate_writes():
    scores = Scores.of(np.array([[0.2, 0.4]], np.float32)), Scores.of(np.array([[0.1, 0.1]], np.float32))
    judging = Judging({}, "emoji", 2, None, f"diversity ({compare.DIVERSITY})")
    rows = compare_all([{judging.diversity: one} for one in scores], judging, ("emoji",))
    assert compare.diversity_change([as_json(row) for row in rows]) == pytest.approx(-0.2)


def test_a_run_that_fails_is_one_line():
    words = programs.command("train", "--config=configs/emoji.py", "--config.seed=-1")
    with pytest.raises(compare.UserError, match=r"egrpo_jax.train --config=configs/emoji.py .* ended with 2: error: "):
        compare.start(words, sorted(compare.os.sched_getaffinity(0)))


STARTS_TWO = """
import signal, sys
from pathlib import Path
from benchmarks import compare_algorithms as compare
signal.signal(signal.SIGTERM, compare.end)
compare.FLAGS(["compare", f"--runs={sys.argv[1]}", "--jobs=2"])
compare.command = lambda _, run, folder: [
    sys.executable, "-c", "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)",
    str(folder / f"pid_{run.seed}"),
]
sweep = compare.load_sweep("tails")
runs = [compare.Run("fast", "final", "2e-4", seed) for seed in range(4)]
compare.run_all(sweep, runs, {}, Path(sys.argv[1]) / "results.json")
"""


def test_a_comparison_that_is_ended_ends_its_trainings(tmp_path):
    with subprocess.Popen([sys.executable, "-c", STARTS_TWO, tmp_path], cwd=programs.ROOT) as process:
        pids = [waited(tmp_path / "tails" / f"pid_{seed}") for seed in (0, 1)]
        process.terminate()
        assert process.wait(60) == 143
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert not list(tmp_path.glob("**/pid_2"))


def waited(file):
    """The number in a file that another process writes."""
    for _ in range(600):
        if file.exists() and (text := file.read_text()):
            return int(text)
        time.sleep(0.1)
    raise AssertionError(f"no {file} within a minute")


def test_the_command_of_a_run(tmp_path):
    sweep = compare.load_sweep("algorithms")._replace(iterations=lambda _: 30)
    tuning, final = (compare.Run("egrpo", stage, "5e-5", 3) for stage in ("tune", "final"))
    workdir = f"--workdir={tmp_path}/egrpo"
    words = compare.command(sweep, final, tmp_path)
    assert words[1:] == [
        *("-m", "egrpo_jax.train", "--config=configs/sweeps/algorithms.py:egrpo", f"{workdir}/final/5e-5/3"),
        *("--config.seed=3", "--config.optim.learning_rate=5e-5"),
    ]
    shorter = compare.command(sweep, tuning, tmp_path)[len(words) :]
    assert shorter[0] == "--config.evaluation.every=30"
    assert [word.split("=")[0] for word in shorter[1:]] == ["--config.prompts", "--config.evaluation.prompts"]


def test_a_run_of_the_comparison(monkeypatch, tmp_path):
    """Of a smaller model; carried out again, it is at its end already."""
    run = compare.Run("toy", "tune", "3e-3", 0)
    toy = programs.command(
        "train", "--config=tests/toy.py", "--config.num_iterations=4", f"--workdir={tmp_path / run.name}"
    )
    monkeypatch.setattr(compare, "command", lambda *_: toy)
    monkeypatch.setattr(compare, "REWARDS", {"tests.toy:redness": "trained"})
    numbers = compare.carry_out(SWEEPS["algorithms"], run, tmp_path, sorted(compare.os.sched_getaffinity(0)))
    first, last = numbers["evaluations"]
    assert (first["iteration"], last["iteration"]) == (0, 4)
    assert first["seconds"] == 0 < last["seconds"]
    assert gain(numbers, "tests.toy:redness") != 0
    again = compare.carry_out(SWEEPS["algorithms"], run, tmp_path, sorted(compare.os.sched_getaffinity(0)))
    assert again == numbers
