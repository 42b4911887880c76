"""Draws the schedules of all algorithms for docs/algorithms.md: `python -m docs.make_algorithms`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from egrpo_jax.figures.schedule import Fan, Tree, schedule_figure
from egrpo_jax.planning.schedule import schedule
from egrpo_jax.rl.algorithms.base import ALGORITHMS, Algorithm
from egrpo_jax.rl.plan import Plan

FOLDER = Path(__file__).with_name("algorithms")
FORMS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {name: {"algorithm": name} for name in ALGORITHMS}
    | {
        "egrpo_exact": {"algorithm": "egrpo", "process": "exact_sde", "entropy_by": "noise"},
        "mix_grpo_flash": {"algorithm": "mix_grpo", "tail_share": 0.4},
        "branch_grpo_pruned": {"algorithm": "branch_grpo", "pruned": 5},
    }
)
"""The published forms of the algorithms, by the names of their pictures."""
ITERATIONS = (0, 100, 200)
"""Shown below one another where they differ."""


def algorithm(form: str) -> Algorithm:
    """The algorithm of a form, with its published defaults but for what the form changes."""
    return Algorithm.variant(FORMS[form])(**FORMS[form])


def panels(form: str) -> dict[str, Fan | Tree]:
    """The schedules of a form's iterations, by their titles; of several that are alike, the first."""
    chosen = algorithm(form)
    drawn = {iteration: schedule(chosen.make_plan(iteration)) for iteration in ITERATIONS}
    if len(set(map(repr, drawn.values()))) == 1:
        return {title(form, chosen.make_plan()): drawn[0]}
    return {f"{title(form, chosen.make_plan(i))}, iteration {i}": panel for i, panel in drawn.items()}


def title(form: str, plan: Plan) -> str:
    """A line above a panel."""
    seeds = f", one of {plan.seeds} seeds" if plan.seeds > 1 else ""
    return f"{form}{seeds}: {plan.rollout_passes} + {plan.training_passes} passes a prompt"


def draw(form: str, path: Path) -> None:
    """A small picture of a form, in few colours; its text "Description" says what is drawn."""
    drawn, about = panels(form), PngInfo()
    about.add_text("Description", repr(drawn))
    schedule_figure(algorithm(form).times, drawn, path)
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(48).save(path, optimize=True, pnginfo=about)


if __name__ == "__main__":
    for name in FORMS:
        draw(name, FOLDER / f"{name}.png")
