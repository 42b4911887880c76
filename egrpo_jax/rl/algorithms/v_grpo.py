"""V-GRPO (arXiv:2604.23380): the error of the predicted data stands for the log-density of a sample."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

import chex

from egrpo_jax.common.ranges import Count, Range
from egrpo_jax.rl.algorithms.samples import SampleAlgorithm, SampleSolver
from egrpo_jax.rl.forward import on_policy_soft_clip, stratified_times, vgrpo_error
from egrpo_jax.rl.forward_plan import ForwardObjective, ForwardPlan, Noised
from egrpo_jax.rl.objective import Batch


@dataclasses.dataclass(frozen=True)
class VGrpo(SampleAlgorithm):
    """V-GRPO (arXiv:2604.23380): no random steps; all samples of a group learn at the same times and noises.

    Attributes:
      pairs: times and noises of a group, one from each of so many chunks of the rollout's times.
      soft_clip: eta: advantages become eta tanh(A / eta), for an iteration of one update, whose ratio is 1; None leaves
        them as they are.
    """

    algorithm: str = "v_grpo"
    solver: SampleSolver = "dpm2m"
    pairs: Count = 4
    soft_clip: Annotated[float, Range(0.01, 1000)] | None = None

    def make_plan(self, iteration: int = 0, seed: int = 0) -> ForwardPlan:
        """The same plan for all iterations."""
        del iteration, seed
        objective = functools.partial(VGrpoObjective, soft_clip=self.soft_clip)
        return self.forward_plan(stratified_times, objective, shares_pairs=True)


@dataclasses.dataclass(frozen=True)
class VGrpoObjective(ForwardObjective):
    """The clipped ratio exp(L_old - L), L being the mean of `vgrpo_error` over the pairs of a sample.

    Attributes:
      soft_clip: eta, or None.
    """

    soft_clip: float | None = None

    def log_density(self, velocity: chex.Array, states: Noised) -> chex.Array:
        """See `ForwardObjective`: -L, `[B, 1]`."""
        return -vgrpo_error(velocity, states.latents, states.data_of_pairs, states.time).mean(-1, keepdims=True)

    def advantage(self, batch: Batch) -> chex.Array:
        """See `ForwardObjective`."""
        clipped = super().advantage(batch)
        return clipped if self.soft_clip is None else on_policy_soft_clip(clipped, self.soft_clip)
