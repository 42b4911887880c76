"""DiffusionNFT (arXiv:2509.16117): good samples draw the policy to them, bad ones to their mirror image."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.common.ranges import Count, Range
from egrpo_jax.rl.algorithms.base import GROUP_SIZE
from egrpo_jax.rl.algorithms.samples import SampleAlgorithm, SampleSolver
from egrpo_jax.rl.forward import nft_loss, permuted_times, vgrpo_error
from egrpo_jax.rl.forward_plan import ForwardObjective, ForwardPlan, Noised
from egrpo_jax.rl.loss import LossStats, SampleLoss, total_loss
from egrpo_jax.rl.objective import Batch, Scored, add_penalty


@dataclasses.dataclass(frozen=True)
class DiffusionNft(SampleAlgorithm):
    """DiffusionNFT (arXiv:2509.16117): no random steps; a loss at noised samples, without log-probabilities.

    Its samples are those of a trailing copy of the policy: `learner.samples`, `learner.trailing_decay`.

    Attributes:
      pairs: times at which each sample trains, of those of its rollout, in an order of its own.
      strength: b, how far the two branches lie from the velocity of the policy that sampled.
    """

    algorithm: str = "diffusion_nft"
    num_steps: Annotated[int, Range(2, 10_000)] = 10
    group_size: Annotated[int, GROUP_SIZE] = 24
    solver: SampleSolver = "dpm2m"
    pairs: Count = 9
    strength: Annotated[float, Range(1e-3, 100)] = 1.0

    def make_plan(self, iteration: int = 0, seed: int = 0) -> ForwardPlan:
        """The same plan for all iterations."""
        del iteration, seed
        return self.forward_plan(permuted_times, functools.partial(NftObjective, strength=self.strength))


@dataclasses.dataclass(frozen=True)
class NftObjective(ForwardObjective):
    """The loss of `nft_loss`, averaged over the times of a sample.

    Attributes:
      strength: b.
    """

    strength: float = 1.0

    def log_density(self, velocity: chex.Array, states: Noised) -> chex.Array:
        """Minus the error of the predicted data, for the statistics alone."""
        return -vgrpo_error(velocity, states.latents, states.data_of_pairs, states.time).mean(-1, keepdims=True)

    @property
    def needs_velocity(self) -> bool:
        """Always: of the policy that sampled."""
        return True

    def loss(self, new: Scored, batch: Batch, weight: chex.Array) -> tuple[chex.Array, LossStats]:
        """See `Objective`."""
        old, states = new if batch.old is None else batch.old, batch.states
        each = nft_loss(
            new.velocity, old.velocity, states.latents, states.data_of_pairs, states.time,
            jnp.broadcast_to(batch.advantage, states.time.shape),
            strength=self.strength, advantage_clip=self.config.advantage_clip,
        ).mean(-1, keepdims=True)  # fmt: skip
        never = jnp.zeros(each.shape, bool)
        log_ratio = new.log_prob - jax.lax.stop_gradient(old.log_prob)
        value, stats = total_loss(SampleLoss(each, never, never), jnp.exp(log_ratio), log_ratio, weight)
        return add_penalty(self.config, new, batch, value, stats)
