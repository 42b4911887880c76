"""Draws the schedules of all algorithms for docs/algorithms.md: `python -m docs.make_algorithms`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from egrpo_jax.figures.schedule import Fan, Offshoot, Tree, schedule_figure
from egrpo_jax.flow.solver import Solver
from egrpo_jax.rl.algorithms.base import ALGORITHMS, Algorithm
from egrpo_jax.rl.plan import AnchorPlan, Plan
from egrpo_jax.rl.tree import TreePlan

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


def schedule(plan: Plan) -> Fan | Tree:
    """The values that the figure of a plan is drawn from."""
    if isinstance(plan, AnchorPlan):
        offshoots = [
            Offshoot(branch.step, branch.stop, tuple(walk(plan, solver, branch.stop) for solver in plan.tail_solvers))
            for branch in plan.branches
        ]
        return Fan(tuple(offshoots), plan.group_size)
    assert isinstance(plan, TreePlan)
    first = plan.branches[0].step if plan.branches else 0
    steps = (first, *(branch.stop for branch in plan.branches))
    return Tree(plan.roots, steps, plan.children, trained(plan), walk(plan, plan.tail_stepper, steps[-1]))


def walk(plan: Plan, solver: Solver, start: int) -> tuple[float, ...]:
    """The places on the grid that a tail passes, between its steps where the solver has times of its own."""
    grid = np.arange(plan.num_steps, -1, -1)
    places = np.interp(solver.nodes(plan.times, start), plan.times[::-1], grid)
    return tuple(round(float(place), 2) for place in places)


def trained(plan: TreePlan) -> tuple[float, ...]:
    """The share of the states of each random step that trains."""
    shares = [1.0] * len(plan.branches)
    if plan.kept is not None:
        last = plan.runs[-1]
        for step in range(last.length):
            share = plan.kept / last.length if plan.kept_steps is None else float(step in plan.kept_steps)
            shares[last.first + step] = share
    return tuple(shares)


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
