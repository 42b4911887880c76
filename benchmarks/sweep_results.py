"""What the runs of a sweep found: intervals over seeds, differences from the sweep's first entry, equal time, figures.

Intervals are 95 %, Student's t over seeds; differences are those of the seeds that both have, pair by pair: a seed
deals both the same prompts and judges them on the same noise. Seconds are those of the least disturbed run of an entry,
on one core, without compiling and evaluations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from egrpo_jax.figures.plots import new_figure, save_figure

Found = dict[str, Any]
"""One run: `evaluations`, rows of iteration, seconds and a mean of each reward; of a final run also `diversity`."""

REWARDS = {"emoji": "trained", "emoji_judge": "judge", "emoji_judge_r1": "judge R@1"}
"""The trained reward first, the held-out judge second; the last: how often that finds the prompt first of all."""
DIVERSITY = "diversity"
HEAD = (
    *("entry", "learning rate", "iterations", "time", "seeds"),
    *(f"{short}, gain" for short in REWARDS.values()),
    *("diversity, change", "trained, difference", "judge, difference"),
)


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

    @classmethod
    def of(cls, name: str) -> Run:
        """The run of a name."""
        entry, stage, rate, seed = name.split("/")
        return cls(entry, stage, rate, int(seed))


class Entry(NamedTuple):
    """What was found of an entry: its final runs by seed, at the best of the rates that were tried."""

    name: str
    rate: str
    runs: dict[int, Found]
    seconds: float

    @property
    def iterations(self) -> int:
        """Of a run."""
        return next(iter(self.runs.values()))["evaluations"][-1]["iteration"]

    def gains(self, reward: str) -> dict[int, float]:
        """The change over each run of a reward; or of the distance between images of a prompt."""
        read = (lambda run: run[DIVERSITY]) if reward == DIVERSITY else (lambda run: gain(run, reward))
        return {seed: read(run) for seed, run in self.runs.items()}

    def gains_at(self, reward: str, seconds: float) -> dict[int, float]:
        """The same of a reward after `seconds` of training, between two evaluations by a straight line."""
        until = lambda run: float(np.interp(seconds, self.times(run), curve(run, reward)) - curve(run, reward)[0])
        return {seed: until(run) for seed, run in self.runs.items()}

    def times(self, run: Found) -> np.ndarray:
        """Seconds of training before each evaluation `[K]`."""
        return self.seconds / self.iterations * curve(run, "iteration")


def curve(run: Found, key: str) -> np.ndarray:
    """A number of each evaluation `[K]`."""
    return np.array([row[key] for row in run["evaluations"]])


def gain(run: Found, reward: str) -> float:
    """The change of a reward from the first evaluation to the last."""
    return curve(run, reward)[-1] - curve(run, reward)[0]


def rates(results: dict[str, Found], entry: str) -> dict[str, float]:
    """The gain of the trained reward on the tuning prompts at each learning rate that was tried."""
    tried = {run: found for run, found in _by_run(results, entry) if run.stage == "tune"}
    return {run.rate: gain(found, next(iter(REWARDS))) for run, found in tried.items()}


def best_rate(results: dict[str, Found], entry: str) -> str:
    """The learning rate with the largest gain; where none was tuned, that of the final runs. Raises ValueError if there
    are no runs."""
    tried = rates(results, entry) or {run.rate: 0.0 for run, _ in _by_run(results, entry)}
    return max(tried, key=lambda rate: tried[rate])


def next_rate(results: dict[str, Found], entry: str) -> str | None:
    """Twice the best rate where it is the largest that was tried, or half of it; None if it lies between two others."""
    tried = sorted(rates(results, entry), key=float)
    best = best_rate(results, entry)
    factor = 2 if best == tried[-1] else 0.5 if best == tried[0] else None
    return None if factor is None else rate_name(factor * float(best))


def rate_name(rate: float) -> str:
    """As rates are written: 8e-4."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def entries(results: dict[str, Found], names: Sequence[str]) -> list[Entry]:
    """Those of `names` that have two final runs or more at their best rate."""
    found = []
    for name in names:
        known = _by_run(results, name)
        runs = {run.seed: one for run, one in known if (run.stage, run.rate) == ("final", best_rate(results, name))}
        if len(runs) > 1:
            rate, seconds = best_rate(results, name), min(one["evaluations"][-1]["seconds"] for _, one in known)
            found.append(Entry(name, rate, runs, seconds))
    return found


def _by_run(results: dict[str, Found], entry: str) -> list[tuple[Run, Found]]:
    return sorted(
        (run, found) for run, found in ((Run.of(name), one) for name, one in results.items()) if run.entry == entry
    )


def interval(gains: dict[int, float]) -> str:
    """The mean and its interval over seeds."""
    mean, half = _mean_and_half(list(gains.values()))
    return f"{mean:+.4f} ± {half:.4f}"


def difference(gains: dict[int, float], others: dict[int, float]) -> str:
    """How much larger gains are than others of the same seeds, the interval, and what that says: wins, loses, ties."""
    mean, half = _mean_and_half([gains[seed] - others[seed] for seed in gains.keys() & others.keys()])
    verdict = "wins" if mean > half else "loses" if mean < -half else "ties"
    return f"{mean:+.4f} ± {half:.4f}, {verdict}"


def _mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the interval."""
    return float(np.mean(values)), float(scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, len(values) - 1))


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *others))


def _by_judge(found: Sequence[Entry], gains: Callable[[Entry, str], dict[int, float]]) -> list[Entry]:
    return sorted(found, key=lambda entry: -np.mean(list(gains(entry, "emoji_judge").values())))


def table(found: Sequence[Entry]) -> str:
    """Markdown of the entries at equal passes, the judge's largest gain first; times are of the first's run."""
    first, rows = found[0], [HEAD]
    for entry in _by_judge(found, Entry.gains):
        cells = [
            entry.name,
            entry.rate,
            str(entry.iterations),
            f"{entry.seconds / first.seconds:.2f}",
            str(len(entry.runs)),
        ]
        cells += [interval(entry.gains(reward)) for reward in (*REWARDS, DIVERSITY)]
        same = entry is first
        cells += ["" if same else difference(entry.gains(r), first.gains(r)) for r in ("emoji", "emoji_judge")]
        rows.append(cells)
    return _markdown(rows)


def table_of_equal_time(found: Sequence[Entry]) -> str:
    """Markdown of the same after as many seconds as the run of the quickest entry has."""
    first, shortest = found[0], min(entry.seconds for entry in found)
    at = lambda entry, reward: entry.gains_at(reward, shortest)
    rows = [("entry", "iterations", "trained, gain", "judge, gain", "trained, difference", "judge, difference")]
    for entry in _by_judge(found, at):
        cells = [entry.name, f"{shortest / entry.seconds * entry.iterations:.1f}"]
        cells += [interval(at(entry, reward)) for reward in ("emoji", "emoji_judge")]
        same = entry is first
        cells += ["" if same else difference(at(entry, r), at(first, r)) for r in ("emoji", "emoji_judge")]
        rows.append(cells)
    return _markdown(rows)


def fill(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks of `name`, as it is where it has none."""
    begin, end = re.escape(f"<!-- {name} -->"), re.escape("<!-- end -->")
    return re.sub(f"({begin}\n).*?(\n{end})", lambda marks: f"{marks[1]}{text}{marks[2]}", page, flags=re.DOTALL)


def plot(found: Sequence[Entry], path: Path) -> None:
    """Trained reward and judge by the share of the passes, and by time; means over seeds."""
    figure = new_figure(13, 8)
    axes = figure.subplots(2, 2)
    for index, entry in enumerate(found):
        mean = lambda read, entry=entry: np.mean([read(run) for run in entry.runs.values()], axis=0)
        look = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":")[index // 10 % 3], "marker": "."}
        times = mean(entry.times)
        for column, reward in enumerate(("emoji", "emoji_judge")):
            change = mean(lambda run, reward=reward: curve(run, reward) - curve(run, reward)[0])
            axes[0, column].plot(times / times[-1], change, label=entry.name, **look)
            axes[1, column].plot(times, change, **look)
    for column, title in enumerate(("trained reward, change", "held-out judge, change")):
        for row, label in enumerate(("share of the forward passes", "seconds on one core")):
            axes[row, column].set(title=title, xlabel=label)
            axes[row, column].grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(figure, path)


def plot_gains(found: Sequence[Entry], path: Path) -> None:
    """Each entry's gains with their intervals, one point a seed, the judge's largest at the top."""
    figure = new_figure(13, 1.5 + 0.32 * len(found))
    ranked = _by_judge(found, Entry.gains)[::-1]
    for axes, reward, title in zip(
        figure.subplots(1, 3, sharey=True), ("emoji", "emoji_judge", DIVERSITY),
        ("trained reward, gain", "held-out judge, gain", "diversity, change"), strict=True,
    ):  # fmt: skip
        for row, entry in enumerate(ranked):
            values = list(entry.gains(reward).values())
            mean, half = _mean_and_half(values)
            color = "C3" if entry is found[0] else "C0"
            axes.errorbar(mean, row, xerr=half, fmt="o", color=color, capsize=3)
            axes.plot(values, [row] * len(values), "|", color=color, alpha=0.5)
        axes.axvline(np.mean(list(found[0].gains(reward).values())), color="C3", linewidth=0.8, linestyle=":")
        axes.set(title=title, yticks=range(len(ranked)), yticklabels=[entry.name for entry in ranked])
        axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path)
