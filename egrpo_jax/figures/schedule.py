"""The figure of a schedule: which steps of the grid are random, where samples part, which states train.

It is drawn from plain values, a `Fan` or a `Tree`, so that it needs no plan. From left to right, from noise to image:
thin lines are steps of the ODE, with a dot at each of its times; thick red ones are random; a red dot is a state that
trains: one forward and backward pass.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from egrpo_jax.figures.plots import new_figure, save_figure
from egrpo_jax.flow.grid import Times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHARED, _RANDOM = "dimgrey", "tab:red"
_OWN = ("tab:blue", "tab:green", "tab:purple")
"""Of the tails that each sample has."""
_SHOWN = 3
"""Samples that are drawn of each group of a fan."""
_FAN_ROW, _TREE_ROW = 0.26, 0.1
"""Inches of a tail of a group, and of a leaf."""

Walk: TypeAlias = Sequence[float]
"""The grid steps between which an ODE's steps go; those of a solver with times of its own lie between the grid's."""


class Offshoot(NamedTuple):
    """A group of samples that leaves the anchor.

    Attributes:
      start: the grid step where they leave it.
      stop: the one where the random step ends.
      tails: the walks from there to the end of the grid.
    """

    start: int
    stop: int
    tails: tuple[Walk, ...]


class Fan(NamedTuple):
    """Groups that branch off an anchor, all of the same size."""

    offshoots: tuple[Offshoot, ...]
    group_size: int


class Tree(NamedTuple):
    """Samples that take several random steps, one after another.

    Attributes:
      roots: initial noises.
      steps: the grid steps between which the random ones go.
      children: of each state at each random step.
      trained: the share of the states of each random step that trains.
      tail: the walk from the last of them to the end of the grid.
    """

    roots: int
    steps: tuple[int, ...]
    children: tuple[int, ...]
    trained: tuple[float, ...]
    tail: Walk


def schedule_figure(times: Times, panels: Mapping[str, Fan | Tree], path: str | os.PathLike[str]) -> None:
    """A panel for each schedule, below one another.

    Args:
      times: T + 1 times from 1 to 0.
      panels: schedules on this grid, by their titles.
      path: PNG to write.

    Raises:
      UserError: if `path` cannot be written.
    """
    heights = [height(panel) for panel in panels.values()]
    figure = new_figure(7.5, sum(heights) + 0.7 + 0.3 * len(panels))
    for number, (axes, (title, panel)) in enumerate(
        zip(np.ravel(figure.subplots(len(panels), 1, sharex=True, height_ratios=heights)), panels.items(), strict=True)
    ):
        axes.set_title(title, fontsize=9, loc="left")
        if isinstance(panel, Fan):
            _draw_fan(axes, len(times) - 1, panel)
        else:
            draw_tree(axes, panel)
        dress(axes, times)
        if number == len(panels) - 1:
            axes.set_xlabel("grid step, and its time", fontsize=8)
    save_figure(figure, path)


def height(panel: Fan | Tree) -> float:
    """Inches of a panel."""
    if isinstance(panel, Fan):
        return _FAN_ROW * (1 + sum(len(offshoot.tails) for offshoot in panel.offshoots))
    return max(0.9, _TREE_ROW * panel.roots * int(np.prod(panel.children)))


def dress(axes: Axes, times: Times) -> None:
    """The axis of grid steps."""
    last = len(times) - 1
    every = 1 if last <= 16 else 2
    shown = [*range(0, last - every + 1, every), last]
    axes.set_xticks(shown, [f"{step}\n{times[step]:.2f}" for step in shown], fontsize=7)
    axes.set_xlim(-0.02 * last, 1.06 * last)
    axes.set_yticks([])
    axes.grid(axis="x", alpha=0.25)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)


def _draw_fan(axes: Axes, last: int, fan: Fan) -> None:
    """The anchor above; the group that leaves it first lies lowest, so that no line crosses another."""
    axes.plot(range(last + 1), [0] * (last + 1), color=_SHARED, linewidth=1, marker=".", markersize=3)
    axes.text(1.015 * last, 0, "anchor", fontsize=7, va="center", color=_SHARED)
    top = -0.5
    for offshoot in reversed(fan.offshoots):
        depth, samples = len(offshoot.tails), min(_SHOWN, fan.group_size)
        lanes = np.linspace(top - 0.2, top - depth + 0.2, samples * depth).reshape(samples, depth)
        for sample in lanes:
            _random(axes, (offshoot.start, offshoot.stop), (0, sample[0]))
            for color, walk, lane in zip(itertools.cycle(_OWN), offshoot.tails, sample, strict=False):
                _tail(axes, walk, (sample[0], *[lane] * (len(walk) - 1)), color)
        axes.text(1.015 * last, lanes.mean(), f"x {fan.group_size}", fontsize=7, va="center", color=_OWN[0])
        _state(axes, offshoot.start, 0, 1)
        top -= depth
    axes.set_ylim(top - 0.2, 0.5)


def draw_tree(axes: Axes, tree: Tree) -> None:
    """Leaves evenly spread, every other state in the middle of its own."""
    widths = list(itertools.accumulate(tree.children, lambda width, count: width * count, initial=tree.roots))
    places = [-np.arange(widths[-1], dtype=float).reshape(width, -1).mean(1) for width in widths]
    for place in places[0]:
        first = range(tree.steps[0] + 1)
        axes.plot(first, [place] * len(first), color=_SHARED, linewidth=1, marker=".", markersize=3)
    levels = zip(itertools.pairwise(tree.steps), itertools.pairwise(places), tree.trained, strict=True)
    for span, (here, there), trained in levels:
        for place, children in zip(here, there.reshape(len(here), -1), strict=True):
            for child in children:
                _random(axes, span, (place, child), trained)
            _state(axes, span[0], place, trained)
    for place in places[-1]:
        _tail(axes, tree.tail, [place] * len(tree.tail), _OWN[0])
    axes.set_ylim(places[-1][-1] - 1, 1)


def _random(axes: Axes, x: tuple[float, float], y: tuple[float, float], trained: float = 1) -> None:
    axes.plot(x, y, color=_RANDOM, linewidth=1.5, alpha=0.8 if trained else 0.35, solid_capstyle="round")


def _tail(axes: Axes, walk: Walk, places: Sequence[float], color: str) -> None:
    axes.plot(walk, places, color=color, linewidth=0.7, marker=".", markersize=2.5)


def _state(axes: Axes, step: float, place: float, trained: float) -> None:
    """A state from which samples are drawn: full if it trains, hollow if chance decides, nothing if it does not."""
    if trained:
        face = _RANDOM if trained == 1 else "white"
        axes.plot(
            [step], [place], "o", color=_RANDOM, markerfacecolor=face, markersize=3.5, markeredgewidth=0.8, zorder=3
        )
