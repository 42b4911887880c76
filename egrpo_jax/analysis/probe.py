"""The plan of an analysis: every step of the grid made random by itself, with pairs of opposite noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp

from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.flow.entropy import exp_entropy, merge_by_entropy, noise_by_entropy
from egrpo_jax.flow.process import ByStd, Process
from egrpo_jax.flow.solver import DpmSolver2M, Euler, Solver, tail_steps
from egrpo_jax.rl.algorithms.base import Algorithm, StepAlgorithm
from egrpo_jax.rl.plan import AnchorPlan, Branch
from egrpo_jax.rl.transitions import step_noise

THRESHOLD = 2.2
"""tau of E-GRPO (arXiv:2601.00423), where the config's algorithm has none."""
FEWER_STEPS, STRIDES = (2, 3, 4, 6), (2, 4)
"""Of tails that may be good enough: steps of DPM-Solver++(2M), and strides of Euler's."""


@dataclasses.dataclass(frozen=True)
class ProbePlan(AnchorPlan):
    """Groups off an anchor at every step, in which sample 2i + 1 has the noise of sample 2i with the other sign."""

    def noise(self, keys: chex.Array, steps: chex.Array, shape: tuple[int, int]) -> chex.Array:
        """See `AnchorPlan`."""
        half = step_noise(keys, steps, jnp.arange(self.group_size // 2), shape)
        return jnp.stack([half, -half], axis=3).reshape(*half.shape[:2], self.group_size, *shape)


class Form(NamedTuple):
    """A kernel to be looked at.

    Attributes:
      name: for people.
      plan: with full tails, of Euler steps.
      settings: keys of E-GRPO's section `plan` that make it so, merged where steps are.
    """

    name: str
    plan: ProbePlan
    settings: Mapping[str, Any]


def forms(algorithm: Algorithm, pairs: int, steps: tuple[int, ...] | None = None) -> list[Form]:
    """The kernels to compare: the config's, each step alone and merged, and the exact one with as much noise.

    Args:
      algorithm: the config's.
      pairs: of samples in a group.
      steps: of the grid; None for all but the last.

    Raises:
      UserError: the algorithm has no random steps, or there is no such step.
    """
    if not isinstance(algorithm, StepAlgorithm):
        expected = "an algorithm with random steps, which are what is analysed"
        raise ConfigError("plan.algorithm", algorithm.algorithm, expected)
    last = algorithm.num_steps - 1
    if steps is not None and (not steps or min(steps) < 0 or max(steps) >= last):
        raise UserError(f"--steps: found {','.join(map(str, steps))}, expected grid steps from 0 to {last - 1}")
    chosen = tuple(range(last)) if steps is None else tuple(sorted(set(steps)))
    threshold = getattr(algorithm, "entropy_threshold", None) or THRESHOLD
    process = algorithm.make_process()
    exact = noise_by_entropy(threshold)
    plan = _plan(algorithm, process, chosen, threshold, pairs)
    merges = any(branch.merge > 1 for branch in plan.branches)
    found = [Form(_name(algorithm.process, process), plan, {"entropy_threshold": threshold} if merges else {})]
    if process != exact:
        settings = {"process": "exact_sde", "entropy_by": "noise", "entropy_threshold": threshold}
        plan = _plan(algorithm, exact, chosen, 0.0, pairs)
        found.append(Form(f"exact_sde, noise by τ = {threshold:g}", plan, settings))
    return found


def _name(name: str, process: Process) -> str:
    if isinstance(process, ByStd):
        return f"{name}, std {', '.join(f'{std:g}' for std in process.stds)}"
    level = getattr(process, "noise_level", None)
    return name if level is None else f"{name}, noise level {level:g}"


def _plan(
    algorithm: StepAlgorithm, process: Process, steps: tuple[int, ...], threshold: float, pairs: int
) -> ProbePlan:
    """Every step alone, and merged to `threshold` where that is longer."""
    times = algorithm.times
    single = [algorithm.make_branch(process, step) for step in steps if exp_entropy(process, times, step, 1) > 0]
    if not single:
        raise ConfigError("plan.process", getattr(algorithm, "process", None), "one whose steps have noise")
    merged: list[Branch] = []
    for branch in single:
        merge = merge_by_entropy(process, times, branch.step, threshold)
        if merge.length > 1:
            merged.append(algorithm.make_branch(process, branch.step, merge.length, merge.clamped))
    return ProbePlan(times, process, (*single, *merged), 2 * pairs, (Euler(),))


def cheaper_tails(algorithm: Algorithm, plan: ProbePlan) -> dict[str, Solver]:
    """Solvers with fewer passes than the full tails of `plan`, by name; the config's own are among them."""
    own = getattr(algorithm, "tail_strides", ()), getattr(algorithm, "tail_steps", ())
    strides, counts = sorted({*STRIDES, *own[0]} - {1}), sorted({*FEWER_STEPS, *own[1]})
    solvers: dict[str, Solver] = {f"2M, {count} steps": DpmSolver2M(count) for count in counts}
    solvers |= {f"Euler, stride {stride}": Euler(stride) for stride in strides}
    longest = min(branch.stop for branch in plan.branches)
    full = tail_steps(Euler(), plan.times, longest)
    return {name: solver for name, solver in solvers.items() if tail_steps(solver, plan.times, longest) < full}
