"""The two figures of a run: the reward curve and the entropy of its steps."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.flow.entropy import exp_entropy
from egrpo_jax.flow.grid import Times
from egrpo_jax.flow.process import Process

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAIN, _EVAL = "tab:blue", "tab:orange"


def reward_curve(
    metrics: Sequence[Mapping[str, float]],
    train: Sequence[str],
    heldout: Sequence[str],
    path: str | os.PathLike[str],
) -> None:
    """A panel per reward: its mean per iteration, and its evaluations with the 95 % interval of the change.

    Args:
      metrics: lines of `metrics.read_metrics`; uses "reward/<name>/mean" and "eval/<name>/mean" and "change_ci95".
      train: the training rewards.
      heldout: the held-out rewards.
      path: PNG to write.

    Raises:
      UserError: if `path` cannot be written.
    """
    names = [*train, *heldout]
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(4 * columns + 1, 3.2 * rows)
    for index, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, columns, index)
        axes.set_title(f"{name} ({'train' if name in train else 'held out'})", fontsize=11)
        _draw_training(axes, metrics, name)
        _draw_evaluation(axes, metrics, name)
        axes.set_xlabel("iteration")
        axes.set_ylabel("reward")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9)
    save_figure(figure, path)


def entropy_plot(
    times: Times,
    process: Process,
    active_steps: Sequence[int],
    merges: Sequence[int],
    threshold: float | None,
    path: str | os.PathLike[str],
) -> None:
    """e^{h/d} of every grid step on its own, and of each active step after merging.

    Args:
      times: T + 1 times from 1 to 0.
      process: the kernel of random steps.
      active_steps: grid steps that are random.
      merges: for each of them, how many grid steps it spans.
      threshold: tau of the entropy rule, drawn as a line; None if the merges were made otherwise.
      path: PNG to write; UserError if it cannot be written.
    """
    steps = range(len(times) - 1)
    single = [exp_entropy(process, times, step, 1) for step in steps]
    merged = [exp_entropy(process, times, step, merge) for step, merge in zip(active_steps, merges, strict=True)]
    figure = new_figure(8, 4.2)
    axes = figure.add_subplot()
    axes.bar(steps, single, width=0.85, color="lightgrey", label="one grid step")
    bars = axes.bar(active_steps, merged, width=0.4, color=_TRAIN, alpha=0.8, label="active step, merged")
    axes.bar_label(bars, labels=list(map(str, merges)), fontsize=9)
    if threshold is not None:
        axes.axhline(threshold, color=_EVAL, linestyle="--", label=f"threshold {threshold:g}")
    axes.set_xlabel("grid step (0 is the noisiest); the number on a bar: grid steps merged")
    axes.set_ylabel("exp(entropy per dimension)")
    axes.set_xlim(-0.6, len(steps) - 0.4)
    axes.locator_params(axis="x", integer=True)
    axes.margins(y=0.12)
    axes.legend(fontsize=9)
    save_figure(figure, path)


def noise_plot(metrics: Sequence[Mapping[str, float]], groups: Sequence[str], path: str | os.PathLike[str]) -> None:
    """The std of each random step over the iterations of a run whose noise adapts.

    Args:
      metrics: lines of `metrics.read_metrics`; uses "noise/<group>".
      groups: names of the steps.
      path: PNG to write; UserError if it cannot be written.
    """
    figure = new_figure(8, 4.2)
    axes = figure.add_subplot()
    for group in groups:
        axes.plot(*_series(metrics, f"noise/{group}"), label=group)
    axes.set_xlabel("iteration")
    axes.set_ylabel("std of the random step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    save_figure(figure, path)


def _series(metrics: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and values of `key`, where it was written and is finite."""
    points = [(line["iteration"], line[key]) for line in metrics if np.isfinite(line.get(key, np.nan))]
    return np.array([x for x, _ in points]), np.array([y for _, y in points])


def _draw_training(axes: Axes, metrics: Sequence[Mapping[str, float]], name: str) -> None:
    """Every iteration in light colour, and a centred running mean over a twentieth of the run."""
    iterations, rewards = _series(metrics, f"reward/{name}/mean")
    if not len(iterations):
        return
    half = max(1, len(rewards) // 40)
    smooth = [np.mean(rewards[max(0, i - half) : i + half + 1]) for i in range(len(rewards))]
    axes.plot(iterations, rewards, color=_TRAIN, alpha=0.3, linewidth=0.8)
    axes.plot(iterations, smooth, color=_TRAIN, linewidth=1.8, label="training, smoothed")


def _draw_evaluation(axes: Axes, metrics: Sequence[Mapping[str, float]], name: str) -> None:
    evaluations = [line for line in metrics if np.isfinite(line.get(f"eval/{name}/mean", np.nan))]
    if not evaluations:
        return
    iterations, means = _series(evaluations, f"eval/{name}/mean")
    widths = np.array([line.get(f"eval/{name}/change_ci95", 0.0) for line in evaluations])
    axes.errorbar(
        iterations, means, yerr=np.nan_to_num(widths), color=_EVAL, marker="o", markersize=4, capsize=3, linewidth=1,
        label="evaluation, bars: 95 % of its change",
    )  # fmt: skip


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # here: slow to import, and no program needs it before its end

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a PNG. Raises UserError if `path` cannot be written."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    atomic_write(path, buffer.getvalue())
