"""The entries of a sweep compared on the emoji task: learning rates tuned for each, several seeds, intervals, figures.

    python -m benchmarks.compare_algorithms --sweep=algorithms --runs=runs/sweeps --jobs=2
    python -m benchmarks.compare_algorithms --sweep=algorithms --only=none      # table and figure of what is there

First every entry is trained with each of `--rates` for half of its iterations, on four fifths of the training
prompts, and judged on the others; then with its best rate, on all of them, for each of `--seeds`, and judged on the
held-out prompts. Each run is one of `egrpo_jax.train`, in a folder of --runs: what is interrupted goes on where it was.
What is found is kept in docs/results/<sweep>.json, and not run again.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from absl import flags
from tqdm import tqdm

from egrpo_jax import cli
from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.errors import UserError
from egrpo_jax.data.prompts import read_prompts
from egrpo_jax.figures.plots import new_figure, save_figure
from egrpo_jax.run.metrics import read_metrics

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
REWARDS = ("emoji", "emoji_judge", "emoji_judge_r1")
"""The trained one, the held-out judge, and how often that finds the prompt first of all."""
DIVERSITY = "emoji_judge"
TUNING_SEED, TUNING_SHARE, HELD_BACK = 100, 2, 5

FLAGS = flags.FlagValues()
SWEEP = flags.DEFINE_string("sweep", "algorithms", "A file of configs/sweeps, without its ending.", flag_values=FLAGS)
RUNS = flags.DEFINE_string(
    "runs", "runs/sweeps", "Folder of the runs; it may be deleted at the end.", flag_values=FLAGS
)
ONLY = flags.DEFINE_list("only", None, "Entries to run; by default all; none: no more.", flag_values=FLAGS)
RATES = flags.DEFINE_list("rates", ["5e-5", "1e-4", "2e-4", "4e-4"], "Learning rates to try.", flag_values=FLAGS)
SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds, from 0 on.", lower_bound=2, flag_values=FLAGS)
JOBS = flags.DEFINE_integer("jobs", 1, "Runs side by side, which share the cores.", lower_bound=1, flag_values=FLAGS)


class Run(NamedTuple):
    """A training: `stage` is "tune" or "final"."""

    entry: str
    stage: str
    rate: str
    seed: int

    @property
    def name(self) -> str:
        """Its name in the results, and of its folder."""
        return f"{self.entry}/{self.stage}/{self.rate}/{self.seed}"


class Sweep(NamedTuple):
    """A file of configs/sweeps: its entries and the iterations of each."""

    name: str
    entries: Sequence[str]
    iterations: Callable[[str], int]


def load_sweep(name: str) -> Sweep:
    """Reads it. Raises UserError if there is no such file."""
    path = ROOT / "configs" / "sweeps" / f"{name}.py"
    if not path.is_file():
        raise UserError(f"--sweep: found {name!r}, expected one of {sorted(p.stem for p in path.parent.glob('*.py'))}")
    module = runpy.run_path(str(path))
    return Sweep(name, module["ENTRIES"], lambda entry: module["get_config"](entry).num_iterations)


def split_prompts(folder: Path) -> tuple[Path, Path]:
    """Files of the training prompts that are trained on while rates are tuned, and of those that judge."""
    names = read_prompts("emoji_train")
    files = folder / "tuning_train.txt", folder / "tuning_judge.txt"
    folder.mkdir(parents=True, exist_ok=True)
    for file, kept in zip(files, (lambda i: i % HELD_BACK, lambda i: not i % HELD_BACK), strict=True):
        atomic_write(file, "".join(f"{name}\n" for i, name in enumerate(names) if kept(i)))
    return files


def command(sweep: Sweep, run: Run, folder: Path) -> list[str]:
    """The training, as a person would start it."""
    iterations = sweep.iterations(run.entry)
    words = [sys.executable, "-m", "egrpo_jax.train", f"--config=configs/sweeps/{sweep.name}.py:{run.entry}"]
    words += [f"--workdir={folder / run.name}", f"--config.seed={run.seed}", f"--config.optim.learning_rate={run.rate}"]
    if run.stage == "tune":
        train, judge = split_prompts(folder)
        share = max(1, iterations // TUNING_SHARE)
        words += [f"--config.num_iterations={share}", f"--config.evaluation.every={share}"]
        words += [f"--config.prompts={train}", f"--config.evaluation.prompts={judge}"]
    return words


def start(words: Sequence[str], cores: Sequence[int]) -> None:
    """Runs a program on `cores`. Raises UserError with its last line if it fails."""
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        os.sched_setaffinity(process.pid, cores)  # before it has threads
        _, errors = process.communicate()
    if process.returncode:
        last = errors.strip().splitlines()[-1:] or ["no word of why"]
        raise UserError(f"{' '.join(words[2:5])} ended with {process.returncode}: {last[0]}")


def carry_out(sweep: Sweep, run: Run, folder: Path, cores: Sequence[int]) -> dict[str, Any]:
    """Trains on `cores`, and judges: the numbers of a run."""
    workdir = folder / run.name
    start(command(sweep, run, folder), cores)
    found = evaluations(workdir)
    if run.stage == "final":
        out = workdir / "evaluation"
        shutil.rmtree(out, ignore_errors=True)
        words = [sys.executable, "-m", "egrpo_jax.evaluate", f"--workdir={workdir}", f"--out={out}"]
        start([*words, "--samples=2", f"--diversity={DIVERSITY}"], cores)
        found["diversity"] = diversity_change(json.loads((out / "table.json").read_text())["scores"])
    return found


def diversity_change(rows: Sequence[dict[str, Any]]) -> float:
    """The change of the distance between the images of a prompt, of the rows of `egrpo_jax.evaluate`."""
    return next(row["change"]["mean"] for row in rows if row["name"] == f"diversity ({DIVERSITY})")


def evaluations(workdir: Path) -> dict[str, Any]:
    """The rewards of a run's evaluations, and the seconds of training before each: the lower quartile of an iteration's
    times their number, as what else the machine does makes some slower, and the first one compiles."""
    lines = read_metrics(workdir / "metrics.jsonl")
    iteration = float(np.quantile([line["seconds/iteration"] for line in lines if "seconds/iteration" in line], 0.25))
    found = []
    for line in lines:
        if f"eval/{REWARDS[0]}/mean" in line:
            rewards = {name: line[f"eval/{name}/mean"] for name in REWARDS}
            found.append({"iteration": int(line["iteration"]), "seconds": line["iteration"] * iteration, **rewards})
    return {"evaluations": found}


def gain(found: dict[str, Any], reward: str) -> float:
    """The change of a reward from the first evaluation to the last."""
    rows = found["evaluations"]
    return rows[-1][reward] - rows[0][reward]


def best_rate(results: dict[str, Any], entry: str) -> str:
    """The learning rate with the largest gain of the trained reward on the tuning prompts."""
    return max(RATES.value, key=lambda rate: gain(results[Run(entry, "tune", rate, TUNING_SEED).name], REWARDS[0]))


def run_all(sweep: Sweep, runs: Sequence[Run], results: dict[str, Any], file: Path) -> None:
    """Carries out what is missing, so many side by side, and writes each down at once."""
    missing = [run for run in runs if run.name not in results]
    if not missing:
        return
    folder, cores = Path(RUNS.value).absolute() / sweep.name, sorted(os.sched_getaffinity(0))
    split_prompts(folder)
    share = max(1, len(cores) // JOBS.value)
    free = [cores[job * share % len(cores) :][:share] for job in range(JOBS.value)]
    lock = threading.Lock()

    def one(run: Run) -> None:
        own = free.pop()
        try:
            found = carry_out(sweep, run, folder, own)
        finally:
            free.append(own)
        with lock:
            results[run.name] = found
            atomic_write(file, json.dumps(results, indent=1, sort_keys=True) + "\n")

    with concurrent.futures.ThreadPoolExecutor(JOBS.value) as pool:
        started = [pool.submit(one, run) for run in missing]
        try:
            for done in tqdm(concurrent.futures.as_completed(started), total=len(missing), desc=runs[0].stage):
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def table(sweep: Sweep, results: dict[str, Any]) -> str:
    """A Markdown table of the entries that have two seeds or more, the largest gain first."""
    rows = []
    for entry in sweep.entries:
        found = finals(results, entry)
        if len(found) < 2:
            continue
        gains = [[gain(run, reward) for run in found] for reward in REWARDS] + [[run["diversity"] for run in found]]
        last = [run["evaluations"][-1] for run in found]
        seconds, iterations = np.mean([row["seconds"] for row in last]), last[0]["iteration"]
        rate = next(name.split("/")[2] for name in results if name.startswith(f"{entry}/final/"))
        cells = [entry, rate, str(iterations), f"{seconds:.0f}", str(len(found)), *map(interval, gains)]
        rows.append((np.mean(gains[1]), cells))
    head = [
        "entry",
        "learning rate",
        "iterations",
        "seconds",
        "seeds",
        *(f"{name}, gain" for name in REWARDS),
        "diversity",
    ]
    lines = [head, ["---"] * len(head), *(cells for _, cells in sorted(rows, key=lambda row: -row[0]))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def finals(results: dict[str, Any], entry: str) -> list[dict[str, Any]]:
    """The final runs of an entry."""
    return [found for name, found in sorted(results.items()) if name.startswith(f"{entry}/final/")]


def interval(values: Sequence[float]) -> str:
    """The mean and its 95 % interval over seeds, by Student's t."""
    half = scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, len(values) - 1)
    return f"{np.mean(values):+.4f} ± {half:.4f}"


def plot(sweep: Sweep, results: dict[str, Any], path: Path) -> None:
    """Trained reward and judge by the share of the passes, and by time; means over seeds."""
    figure = new_figure(13, 8)
    axes = figure.subplots(2, 2)
    styles = ("-", "--", ":")
    for index, entry in enumerate(entry for entry in sweep.entries if finals(results, entry)):
        runs = [run["evaluations"] for run in finals(results, entry)]
        mean = lambda key, runs=runs: np.mean([[row[key] for row in rows] for rows in runs], axis=0)
        share = mean("iteration") / runs[0][-1]["iteration"]
        for column, reward in enumerate(REWARDS[:2]):
            look = {"color": f"C{index % 10}", "linestyle": styles[index // 10 % 3], "marker": ".", "label": entry}
            axes[0, column].plot(share, mean(reward), **look)
            axes[1, column].plot(mean("seconds"), mean(reward), **look)
    for column, reward in enumerate(REWARDS[:2]):
        for row, label in enumerate(("share of the forward passes", "seconds")):
            axes[row, column].set_title(f"{reward} ({'trained' if column == 0 else 'held out'})", fontsize=11)
            axes[row, column].set_xlabel(label)
            axes[row, column].grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(figure, path)


def main() -> None:
    """Tunes, trains, and shows."""
    sweep = load_sweep(SWEEP.value)
    chosen = sweep.entries if ONLY.value is None else [entry for entry in ONLY.value if entry != "none"]
    if unknown := set(chosen) - set(sweep.entries):
        raise UserError(f"--only: found {sorted(unknown)}, expected some of {', '.join(sweep.entries)}")
    file = RESULTS / f"{sweep.name}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    run_all(sweep, [Run(e, "tune", rate, TUNING_SEED) for e in chosen for rate in RATES.value], results, file)
    best = {entry: best_rate(results, entry) for entry in chosen}
    run_all(sweep, [Run(e, "final", best[e], seed) for seed in range(SEEDS.value) for e in chosen], results, file)
    print(table(sweep, results))
    if any(finals(results, entry) for entry in sweep.entries):
        plot(sweep, results, RESULTS / f"{sweep.name}.png")


if __name__ == "__main__":
    cli.run(main, FLAGS)
