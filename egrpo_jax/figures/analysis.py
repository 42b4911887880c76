"""The figure of an analysis: small panels over the steps of the grid, a line for each way to make them random."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from egrpo_jax.figures.plots import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("tab:blue", "tab:green", "tab:orange", "tab:purple")


class Line(NamedTuple):
    """Values over grid steps, `[K]`, and the ends of their intervals, nan where there are none."""

    steps: Sequence[int]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Panel(NamedTuple):
    """Lines by the names of what they are of; `level` is drawn across, with `level_name`; `log`: on a log scale."""

    title: str
    lines: Mapping[str, Line]
    level: float | None = None
    level_name: str = ""
    log: bool = False


class Bar(NamedTuple):
    """A number with its interval."""

    name: str
    value: float
    low: float
    high: float


def analysis_figure(
    panels: Sequence[Panel], bars: Sequence[Bar], bars_title: str, level: float, path: str | os.PathLike[str]
) -> None:
    """Draws `panels`, and `bars` with a line at `level` beside them. Raises UserError if `path` cannot be written."""
    columns = 3
    rows = -(-(len(panels) + 1) // columns)
    figure = new_figure(4.1 * columns, 3.1 * rows + 0.5)
    for index, panel in enumerate(panels, start=1):
        _draw(figure.add_subplot(rows, columns, index), panel)
    _draw_bars(figure.add_subplot(rows, columns, len(panels) + 1), bars, bars_title, level)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    save_figure(figure, path)


def _draw(axes: Axes, panel: Panel) -> None:
    shifts = np.linspace(-0.12, 0.12, len(panel.lines)) if len(panel.lines) > 1 else [0.0]
    for shift, color, (name, line) in zip(shifts, COLORS, panel.lines.items(), strict=False):
        x, values = np.array(line.steps) + shift, np.array(line.values, float)
        below, above = values - np.array(line.low, float), np.array(line.high, float) - values
        error = np.nan_to_num(np.clip([below, above], 0, None))
        axes.errorbar(x, values, error, color=color, label=name, marker="o", markersize=3, linewidth=1, capsize=2)
    if panel.level is not None:
        axes.axhline(panel.level, color="grey", linestyle="--", linewidth=1)
        axes.annotate(
            panel.level_name,
            (0.99, panel.level),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
    if panel.log:
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("grid step (0 is the noisiest)", fontsize=9)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3)


def _draw_bars(axes: Axes, bars: Sequence[Bar], title: str, level: float) -> None:
    places = np.arange(len(bars))[::-1]
    values = np.array([bar.value for bar in bars])
    error = np.nan_to_num([[bar.value - bar.low for bar in bars], [bar.high - bar.value for bar in bars]])
    axes.barh(places, values, xerr=np.clip(error, 0, None), height=0.6, color="lightsteelblue", ecolor="tab:blue")
    axes.axvline(level, color="grey", linestyle="--", linewidth=1)
    axes.set_yticks(places, [bar.name for bar in bars], fontsize=8)
    axes.set_xlim(min(0.8, *(values - 0.05)) if len(bars) else 0, 1)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3, axis="x")
