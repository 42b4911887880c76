"""What the runs of a sweep found: intervals over seeds, differences from the sweep's first entry, equal time, figures.

Intervals are 95 %: Student's t over seeds for a mean, Welch's for the difference of two. Seconds are those of the least
disturbed run of an entry, on one core, without compiling and evaluations.
"""

from __future__ import annotations

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
    runs: list[Found]
    seconds: float

    @property
    def iterations(self) -> int:
        """Of a run."""
        return self.runs[0]["evaluations"][-1]["iteration"]

    def gains(self, reward: str) -> np.ndarray:
        """The change over each run `[S]` of a reward; or of the distance between images of a prompt."""
        if reward == DIVERSITY:
            return np.array([run[DIVERSITY] for run in self.runs])
        return np.array([gain(run, reward) for run in self.runs])

    def gains_at(self, reward: str, seconds: float) -> np.ndarray:
        """The same `[S]` after `seconds` of training, between two evaluations by a straight line."""
        return np.array(
            [np.interp(seconds, self.times(run), curve(run, reward)) - curve(run, reward)[0] for run in self.runs]
        )

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
        runs = [one for run, one in known if (run.stage, run.rate) == ("final", best_rate(results, name))]
        if len(runs) > 1:
            rate, seconds = best_rate(results, name), min(one["evaluations"][-1]["seconds"] for _, one in known)
            found.append(Entry(name, rate, runs, seconds))
    return found


def _by_run(results: dict[str, Found], entry: str) -> list[tuple[Run, Found]]:
    return sorted(
        (run, found) for run, found in ((Run.of(name), one) for name, one in results.items()) if run.entry == entry
    )


def interval(values: np.ndarray) -> str:
    """The mean and its interval over seeds."""
    half = scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, len(values) - 1)
    return f"{np.mean(values):+.4f} ± {half:.4f}"


def difference(values: np.ndarray, others: np.ndarray) -> str:
    """How much larger the mean is than that of others, its interval, and what that says: wins, loses, or a tie."""
    low, high = scipy.stats.ttest_ind(values, others, equal_var=False).confidence_interval()
    verdict = "wins" if low > 0 else "loses" if high < 0 else "ties"
    return f"{(low + high) / 2:+.4f} ± {(high - low) / 2:.4f}, {verdict}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *others = rows
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *others))


def _by_judge(found: Sequence[Entry], gains: Callable[[Entry, str], np.ndarray]) -> list[Entry]:
    return sorted(found, key=lambda entry: -gains(entry, "emoji_judge").mean())


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


def plot(found: Sequence[Entry], path: Path) -> None:
    """Trained reward and judge by the share of the passes, and by time; means over seeds."""
    figure = new_figure(13, 8)
    axes = figure.subplots(2, 2)
    for index, entry in enumerate(found):
        mean = lambda read, entry=entry: np.mean([read(run) for run in entry.runs], axis=0)
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
            values = entry.gains(reward)
            half = scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, len(values) - 1)
            color = "C3" if entry is found[0] else "C0"
            axes.errorbar(values.mean(), row, xerr=half, fmt="o", color=color, capsize=3)
            axes.plot(values, [row] * len(values), "|", color=color, alpha=0.5)
        axes.axvline(found[0].gains(reward).mean(), color="C3", linewidth=0.8, linestyle=":")
        axes.set(title=title, yticks=range(len(ranked)), yticklabels=[entry.name for entry in ranked])
        axes.grid(alpha=0.3, axis="x")
    save_figure(figure, path)
