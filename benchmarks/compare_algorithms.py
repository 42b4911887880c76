"""The entries of a sweep compared on the emoji task: learning rates tuned for each, several seeds, intervals, figures.

    python -m benchmarks.compare_algorithms --sweep=algorithms --runs=runs/sweeps --jobs=2
    python -m benchmarks.compare_algorithms --sweep=algorithms --only=none      # the page and figures of what is there
    python -m benchmarks.compare_algorithms --sweep=algorithms --repeat=egrpo/final/2e-4/0      # a run once more

First every entry is trained with each rate of the sweep on four fifths of the training prompts, and judged on the
others; where the largest or the smallest is best, with twice or half of it as well, until the best lies between two
others. (A sweep of one rate has nothing to tune.) Then with its best rate, on all of them, for each of `--seeds`, and
judged on the held-out prompts. Each run is one of
`egrpo_jax.train`, in a folder of --runs: what is interrupted goes on where it was. What is found is kept in
docs/results/<sweep>.json, and not run again unless the sweep's iterations have changed.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from absl import flags
from tqdm import tqdm

from benchmarks import sweep_results
from benchmarks.sweep_results import REWARDS, Found, Run, curve
from egrpo_jax import cli
from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.errors import UserError
from egrpo_jax.data.prompts import read_prompts
from egrpo_jax.run.metrics import read_metrics

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results"
DIVERSITY = "emoji_judge"
TUNING_SEED, HELD_BACK = 100, 5
TOLERANCE = 0.01
"""Of a run that is repeated, on whatever machine: small rounding grows in training."""

FLAGS = flags.FlagValues()
SWEEP = flags.DEFINE_string("sweep", "algorithms", "A file of configs/sweeps, without its ending.", flag_values=FLAGS)
RUNS = flags.DEFINE_string(
    "runs", "runs/sweeps", "Folder of the runs; it may be deleted at the end.", flag_values=FLAGS
)
ONLY = flags.DEFINE_list("only", None, "Entries to run; by default all; none: no more.", flag_values=FLAGS)
REPEAT = flags.DEFINE_string("repeat", None, "A run of the results to carry out once more, alone.", flag_values=FLAGS)
SEEDS = flags.DEFINE_integer("seeds", 5, "Seeds, from 0 on.", lower_bound=2, flag_values=FLAGS)
JOBS = flags.DEFINE_integer("jobs", 1, "Runs side by side, which share the cores.", lower_bound=1, flag_values=FLAGS)


_STARTED: set[subprocess.Popen[str]] = set()


class Sweep(NamedTuple):
    """A file of configs/sweeps: its entries, the learning rates to begin with, the iterations of an entry."""

    name: str
    entries: Sequence[str]
    rates: Sequence[str]
    iterations: Callable[[str], int]


def load_sweep(name: str) -> Sweep:
    """Reads it. Raises UserError if there is no such file."""
    path = ROOT / "configs" / "sweeps" / f"{name}.py"
    if not path.is_file():
        raise UserError(f"--sweep: found {name!r}, expected one of {sorted(p.stem for p in path.parent.glob('*.py'))}")
    module = runpy.run_path(str(path))
    iterations = lambda entry: module["get_config"](entry).num_iterations
    return Sweep(name, module["ENTRIES"], module["RATES"], iterations)


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
    words = [sys.executable, "-m", "egrpo_jax.train", f"--config=configs/sweeps/{sweep.name}.py:{run.entry}"]
    words += [f"--workdir={folder / run.name}", f"--config.seed={run.seed}", f"--config.optim.learning_rate={run.rate}"]
    if run.stage == "tune":
        train, judge = split_prompts(folder)
        words += [f"--config.evaluation.every={sweep.iterations(run.entry)}"]
        words += [f"--config.prompts={train}", f"--config.evaluation.prompts={judge}"]
    return words


def start(words: Sequence[str], cores: Sequence[int]) -> None:
    """Runs a program on `cores`. Raises UserError with its last line if it fails."""
    pipe = subprocess.PIPE
    with subprocess.Popen(words, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        os.sched_setaffinity(process.pid, cores)  # before it has threads
        _STARTED.add(process)
        _, errors = process.communicate()
        _STARTED.remove(process)
    if process.returncode:
        last = errors.strip().splitlines()[-1:] or ["no word of why"]
        raise UserError(f"{' '.join(words[2:5])} ended with {process.returncode}: {last[0]}")


def end(*_: Any) -> NoReturn:
    """What SIGTERM does."""
    raise SystemExit(128 + signal.SIGTERM)


def carry_out(sweep: Sweep, run: Run, folder: Path, cores: Sequence[int]) -> Found:
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


def evaluations(workdir: Path) -> Found:
    """The rewards of a run's evaluations, and the seconds of training before each: the lower quartile of an iteration's
    times their number, as what else the machine does makes some slower, and the first one compiles."""
    lines = read_metrics(workdir / "metrics.jsonl")
    iteration = float(np.quantile([line["seconds/iteration"] for line in lines if "seconds/iteration" in line], 0.25))
    found = []
    for line in lines:
        if any(f"eval/{name}/mean" in line for name in REWARDS):
            rewards = {name: line[f"eval/{name}/mean"] for name in REWARDS}
            found.append({"iteration": int(line["iteration"]), "seconds": line["iteration"] * iteration, **rewards})
    return {"evaluations": found}


def load_results(sweep: Sweep, file: Path) -> dict[str, Found]:
    """The runs that are there, of entries and as many iterations as the sweep has now; others are not counted."""
    results = json.loads(file.read_text()) if file.exists() else {}
    wanted = {entry: sweep.iterations(entry) for entry in sweep.entries}
    counts = lambda name: curve(results[name], "iteration")[-1] == wanted.get(Run.of(name).entry)
    return {name: results[name] for name in results if counts(name)}


def run_all(sweep: Sweep, runs: Sequence[Run], results: dict[str, Found], file: Path) -> None:
    """Carries out what is missing, so many side by side, and writes each down at once."""
    missing = [run for run in runs if run.name not in results]
    if not missing:
        return
    folder, cores = Path(RUNS.value).absolute() / sweep.name, sorted(os.sched_getaffinity(0))
    split_prompts(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / ".compilation_cache"))  # seeds compile alike
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
        except SystemExit:  # trainings that went on would keep their folders from the next comparison
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_STARTED):
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def tune(sweep: Sweep, chosen: Sequence[str], results: dict[str, Found], file: Path) -> dict[str, str]:
    """The best rate of each: trains with those of the sweep, and with more beyond those that are best at an end."""
    if len(sweep.rates) == 1:
        return dict.fromkeys(chosen, sweep.rates[0])
    runs = [Run(entry, "tune", rate, TUNING_SEED) for entry in chosen for rate in sweep.rates]
    while runs:
        run_all(sweep, runs, results, file)
        beyond = [(entry, sweep_results.next_rate(results, entry)) for entry in chosen]
        runs = [Run(entry, "tune", rate, TUNING_SEED) for entry, rate in beyond if rate is not None]
    return {entry: sweep_results.best_rate(results, entry) for entry in chosen}


def repeat(sweep: Sweep, name: str, results: dict[str, Found]) -> None:
    """Carries out a run that is in the results once more. Raises UserError if it takes another course."""
    if name not in results:
        raise UserError(f"--repeat: found {name!r}, expected a run of {sweep.name}.json, as egrpo/final/2e-4/0")
    run = Run.of(name)
    folder = Path(RUNS.value).absolute() / sweep.name
    found = carry_out(sweep, run, folder, sorted(os.sched_getaffinity(0)))
    for reward in ("emoji", "emoji_judge"):
        again, before = curve(found, reward), curve(results[run.name], reward)
        print(f"{reward}: {np.round(again, 4)}, in the results {np.round(before, 4)}")
        if abs(again - before).max() > TOLERANCE:
            raise UserError(f"--repeat: {reward} of {run.name} is not what the results say, by more than {TOLERANCE}")


def show(sweep: Sweep, results: dict[str, Found]) -> None:
    """Prints the tables of what is there, writes them into the page, and draws the figures."""
    if found := sweep_results.entries(results, sweep.entries):
        passes, time = sweep_results.table(found), sweep_results.table_of_equal_time(found)
        print(passes, time, sep="\n\n")
        page = RESULTS / "algorithms.md"
        text = sweep_results.fill(page.read_text(), f"{sweep.name}, equal passes", passes)
        atomic_write(page, sweep_results.fill(text, f"{sweep.name}, equal time", time))
        sweep_results.plot(found, RESULTS / f"{sweep.name}.png")
        sweep_results.plot_gains(found, RESULTS / f"{sweep.name}_gains.png")


def main() -> None:
    """Tunes, trains, and shows."""
    sweep = load_sweep(SWEEP.value)
    file = RESULTS / f"{sweep.name}.json"
    results = load_results(sweep, file)
    if REPEAT.value is not None:
        repeat(sweep, REPEAT.value, results)
        return
    chosen = sweep.entries if ONLY.value is None else [entry for entry in ONLY.value if entry != "none"]
    if unknown := set(chosen) - set(sweep.entries):
        raise UserError(f"--only: found {sorted(unknown)}, expected some of {', '.join(sweep.entries)}")
    best = tune(sweep, chosen, results, file)
    run_all(sweep, [Run(e, "final", best[e], seed) for seed in range(SEEDS.value) for e in chosen], results, file)
    show(sweep, results)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    cli.run(main, FLAGS)
