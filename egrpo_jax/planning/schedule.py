"""A plan as the values that its picture is drawn from."""

from __future__ import annotations

import numpy as np

from egrpo_jax.figures.schedule import Fan, Offshoot, Tree
from egrpo_jax.flow.solver import Solver
from egrpo_jax.rl.plan import AnchorPlan, Plan
from egrpo_jax.rl.tree import TreePlan


def schedule(plan: Plan) -> Fan | Tree:
    """The values that the figure of a plan is drawn from."""
    if isinstance(plan, AnchorPlan):
        offshoots = [
            Offshoot(branch.step, branch.stop, tuple(_walk(plan, solver, branch.stop) for solver in plan.tail_solvers))
            for branch in plan.branches
        ]
        return Fan(tuple(offshoots), plan.group_size)
    assert isinstance(plan, TreePlan)
    first = plan.branches[0].step if plan.branches else 0
    steps = (first, *(branch.stop for branch in plan.branches))
    return Tree(plan.roots, steps, plan.children, _trained(plan), _walk(plan, plan.tail_stepper, steps[-1]))


def _walk(plan: Plan, solver: Solver, start: int) -> tuple[float, ...]:
    """The places on the grid that a tail passes, between its steps where the solver has times of its own."""
    grid = np.arange(plan.num_steps, -1, -1)
    places = np.interp(solver.nodes(plan.times, start), plan.times[::-1], grid)
    return tuple(round(float(place), 2) for place in places)


def _trained(plan: TreePlan) -> tuple[float, ...]:
    """The share of the states of each random step that trains."""
    shares = [1.0] * len(plan.branches)
    if plan.kept is not None:
        last = plan.runs[-1]
        for step in range(last.length):
            share = plan.kept / last.length if plan.kept_steps is None else float(step in plan.kept_steps)
            shares[last.first + step] = share
    return tuple(shares)
