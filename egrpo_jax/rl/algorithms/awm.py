"""AWM, Advantage Weighted Matching: a policy gradient of how well the velocity fits the samples."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import chex

from egrpo_jax.common.ranges import Count, Range
from egrpo_jax.rl.algorithms.base import GROUP_SIZE
from egrpo_jax.rl.algorithms.samples import SampleAlgorithm
from egrpo_jax.rl.forward import awm_log_density, stratified_times
from egrpo_jax.rl.forward_plan import ForwardObjective, ForwardPlan, Noised
from egrpo_jax.rl.objective import Batch


@dataclasses.dataclass(frozen=True)
class Awm(SampleAlgorithm):
    """AWM (code of Advantage Weighted Matching): no random steps; a matching error stands for the log-density.

    Without a clip the distance from a trailing copy, `learner.trailing_weight`, keeps it stable. Advantages are divided
    by `learner.advantage_clip`.

    Attributes:
      pairs: times at which each sample trains, one from each of so many strata.
    """

    algorithm: str = "awm"
    num_steps: Annotated[int, Range(2, 10_000)] = 14
    group_size: Annotated[int, GROUP_SIZE] = 24
    pairs: Count = 6
    noisiest: Annotated[float, Range(0.01, 1)] = 0.9

    def make_plan(self, iteration: int = 0, seed: int = 0) -> ForwardPlan:
        """The same plan for all iterations."""
        del iteration, seed
        return self.forward_plan(stratified_times, AwmObjective)


@dataclasses.dataclass(frozen=True)
class AwmObjective(ForwardObjective):
    """The clipped ratio of `awm_log_density` at each time of a sample, averaged over them."""

    def log_density(self, velocity: chex.Array, states: Noised) -> chex.Array:
        """See `ForwardObjective`: `[B, C]`."""
        return awm_log_density(velocity, states.data_of_pairs, states.noise, states.time)

    def advantage(self, batch: Batch) -> chex.Array:
        """See `ForwardObjective`."""
        return super().advantage(batch) / self.config.advantage_clip
