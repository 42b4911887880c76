"""The figure of a plan: the schedule, and what each phase takes of a device."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from egrpo_jax.figures.plots import new_figure, save_figure
from egrpo_jax.figures.schedule import Tree, draw_tree, dress, height
from egrpo_jax.flow.grid import Times

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ANCHOR, _RANDOM, _TAIL = "lightgrey", "tab:orange", "tab:blue"


class Span(NamedTuple):
    """A random step: from grid step `start` to `stop`, and its e^{h/d}."""

    start: int
    stop: int
    exp_entropy: float


class PhaseBars(NamedTuple):
    """A phase on one device.

    Attributes:
      memory: bytes, by what they are.
      flops: of an iteration.
      wire: bytes of an iteration from other devices, by kind of transfer.
    """

    memory: Mapping[str, float]
    flops: float
    wire: Mapping[str, float]


def cost_figure(
    times: Times,
    schedule: Sequence[Span] | Tree,
    phases: Mapping[str, PhaseBars],
    capacity: float | None,
    title: str,
    path: str | os.PathLike[str],
) -> None:
    """The schedule above; memory, operations and transfers of the phases below.

    Args:
      times: T + 1 times from 1 to 0.
      schedule: the random steps of groups that branch off an anchor, or a tree of them.
      phases: by name.
      capacity: bytes of a device, drawn as a line; None if unknown.
      title: what was planned, and for what.
      path: PNG to write.

    Raises:
      UserError: if `path` cannot be written.
    """
    inches = height(schedule) if isinstance(schedule, Tree) else 1.2 + 0.25 * len(schedule)
    figure = new_figure(11, 3.3 + inches)
    figure.suptitle(title, fontsize=12)
    grid = figure.add_gridspec(2, 3, height_ratios=(inches, 3.3), width_ratios=(2, 1, 1))
    above = figure.add_subplot(grid[0, :])
    if isinstance(schedule, Tree):
        draw_tree(above, schedule)
        dress(above, times)
    else:
        _draw_spans(above, times, schedule)
    memory, flops, wire = (figure.add_subplot(grid[1, column]) for column in range(3))
    names = list(phases)
    _stack(memory, names, [{part: value / 2**30 for part, value in phases[name].memory.items()} for name in names])
    memory.set_title("memory of a device, GiB", fontsize=11)
    if capacity is not None:
        memory.axhline(capacity / 2**30, color="black", linestyle="--", linewidth=1, label="usable")
    memory.set_xlim(-0.5, len(names) + 1.1)
    memory.legend(fontsize=8, loc="center right")
    flops.bar(names, [phases[name].flops / 1e12 for name in names], color=_TAIL, width=0.6)
    flops.set_title("TFLOP of a device, an iteration", fontsize=11)
    _stack(wire, names, [{kind: value / 1e9 for kind, value in phases[name].wire.items()} for name in names])
    wire.set_title("GB received, an iteration", fontsize=11)
    for axes in (memory, flops, wire):
        axes.margins(y=0.1)
    if wire.get_legend_handles_labels()[0]:
        wire.legend(fontsize=8)
    save_figure(figure, path)


def _draw_spans(axes: Axes, times: Times, spans: Sequence[Span]) -> None:
    """A row for each random step: the anchor up to it, the step, the tails after it."""
    last = len(times) - 1
    for row, span in enumerate(spans):
        axes.barh(row, span.start, color=_ANCHOR, height=0.6, label=None if row else "anchor")
        axes.barh(
            row,
            span.stop - span.start,
            left=span.start,
            color=_RANDOM,
            height=0.6,
            label=None if row else "random step",
        )
        axes.barh(
            row, last - span.stop, left=span.stop, color=_TAIL, alpha=0.4, height=0.6, label=None if row else "tails"
        )
        axes.text((span.start + span.stop) / 2, row, f"{span.exp_entropy:.2f}", ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(spans)), [f"step {span.start}" for span in spans], fontsize=9)
    axes.invert_yaxis()
    axes.set_xticks(range(last + 1), [f"{time:.3g}" for time in times], fontsize=7, rotation=45)
    axes.set_xlim(0, last)
    axes.set_xlabel("time of each grid step; in a random step: exp(entropy per dimension)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=9, loc="lower left")


def _stack(axes: Axes, names: Sequence[str], parts: Sequence[Mapping[str, float]]) -> None:
    """Stacked bars; a part has the same colour in each."""
    kinds = list(dict.fromkeys(kind for part in parts for kind in part))
    bottom = [0.0] * len(names)
    axes.bar(names, bottom)  # where there is nothing to stack, the names are there
    for kind in kinds:
        heights = [part.get(kind, 0.0) for part in parts]
        axes.bar(names, heights, bottom=bottom, width=0.6, label=kind)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
