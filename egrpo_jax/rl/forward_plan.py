"""Plans without random steps: samples of the ODE, noised again to times at which the policy learns from them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.flow.grid import Times
from egrpo_jax.flow.solver import VelocityFn, tail_steps
from egrpo_jax.rl.forward import density_ratio, noised
from egrpo_jax.rl.learner import LearnerConfig, StepWeights
from egrpo_jax.rl.loss import LossStats, clipped_ratio_loss, total_loss
from egrpo_jax.rl.objective import Batch, Objective, Scored, add_penalty
from egrpo_jax.rl.plan import Block, Normalise, Plan
from egrpo_jax.rl.transitions import Rollout
from egrpo_jax.rl.tree import TreePlan, TreeSchedule, Walker

DrawTimes: TypeAlias = Callable[[chex.PRNGKey, Times, int], chex.Array]
"""So many times of a grid, `[C]`: `forward.permuted_times` and its like."""
_PAIRS = 2**30 + 1
"""Folded into a rollout's key for the times and noises of its samples; no grid step has this number."""


class Noised(NamedTuple):
    """Samples to learn from: of each of P rollouts M, each noised to C times.

    Attributes:
      data: x_0, `[P, M, N, D]`.
      latents, noise: x_t and the noise in it, `[P, M, C, N, D]`.
      time: `[P, M, C]`.
      step: 0, `[P, M]`: there are no random steps to tell apart.
      sample: which of the rollout's G it is, `[P, M, 1]`.
    """

    data: chex.Array
    latents: chex.Array
    noise: chex.Array
    time: chex.Array
    step: chex.Array
    sample: chex.Array

    @property
    def data_of_pairs(self) -> chex.Array:
        """x_0 at each of the times, like `latents`."""
        return jnp.broadcast_to(self.data[..., None, :, :], self.latents.shape)


@dataclasses.dataclass(frozen=True)
class ForwardObjective(Objective):
    """A loss of the velocities at noised samples, by default the clipped ratio of what stands for their densities.

    Attributes:
      config: the section `learner`.
    """

    config: LearnerConfig

    @abc.abstractmethod
    def log_density(self, velocity: chex.Array, states: Noised) -> chex.Array:
        """In the place of log-densities of B samples, `[B, C]`, or `[B, 1]`; `velocity` is `[B, C, N, D]`."""

    @property
    def needs_velocity(self) -> bool:
        """True if the loss refers to the velocities of other policies."""
        return self.config.reference_weight > 0 or self.config.trailing_weight > 0

    def advantage(self, batch: Batch) -> chex.Array:
        """Advantages `[B, 1]` as the loss takes them."""
        return jnp.clip(batch.advantage, -self.config.advantage_clip, self.config.advantage_clip)

    def score(self, velocity_fn: VelocityFn, params: Any, states: Noised, conditioning: Any) -> Scored:
        """See `Objective`; the pairs of a sample are one more batch axis."""
        batch, pairs = states.time.shape
        flat = states.latents.reshape(batch * pairs, *states.latents.shape[2:])
        of_pairs = jax.tree.map(lambda x: jnp.repeat(x, pairs, axis=0), conditioning)
        velocity = velocity_fn(params, flat, states.time.ravel(), of_pairs).reshape(states.latents.shape)
        return Scored(self.log_density(velocity, states), velocity=velocity if self.needs_velocity else None)

    def loss(self, new: Scored, batch: Batch, weight: chex.Array) -> tuple[chex.Array, LossStats]:
        """See `Objective`."""
        old = new if batch.old is None else batch.old
        ratio = density_ratio(new.log_prob, old.log_prob)
        advantage = jnp.broadcast_to(self.advantage(batch), ratio.shape)
        samples = clipped_ratio_loss(ratio, advantage, self.config.clip_range)
        log_ratio = new.log_prob - jax.lax.stop_gradient(old.log_prob)
        value, stats = total_loss(samples, ratio, log_ratio, weight / ratio.shape[1])
        return add_penalty(self.config, new, batch, value, stats)


@dataclasses.dataclass(frozen=True)
class ForwardPlan(TreePlan):
    """The plan of samples that are walked by the ODE alone, each from an initial noise of its own.

    Attributes:
      pairs: C, times and noises at which the policy learns from each sample.
      draw: these times, of a grid.
      learns_at: that grid.
      shares_pairs: all samples of a rollout have the same times and noises.
      make_objective: the loss, of the section `learner`.
    """

    pairs: int = 1
    draw: DrawTimes | None = None
    learns_at: Times = ()
    shares_pairs: bool = False
    make_objective: Callable[[LearnerConfig], ForwardObjective] | None = None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """One: the samples."""
        return (Block(self.group_size, 1),)

    @property
    def shared_passes(self) -> int:
        """None."""
        return 0

    @property
    def own_passes(self) -> int:
        """All."""
        return self.group_size * tail_steps(self.tail_stepper, self.times, 0)

    def training_passes_in(self, minibatches: int) -> int:
        """See `Plan`: of every pair."""
        return self.pairs * super().training_passes_in(minibatches)

    def schedule(self) -> TreeSchedule:
        """See `TreeSchedule`; there are no random steps in it."""
        tail, walk = self._walk(0)
        nothing = np.zeros(0, np.float32)
        steps = (nothing.astype(np.int32), nothing, nothing, nothing)
        return TreeSchedule(np.array(0, np.int32), np.array(self.times, np.float32), steps, tail, walk, steps[0])

    def roll_out(
        self,
        velocity_fn: VelocityFn,
        params: Any,
        deal: Any,
        schedule: Any,
        conditioning: Any,
        keys: chex.Array,
        shape: tuple[int, int],
    ) -> Rollout:
        """See `Plan`; in the place of transitions `Noised`."""
        walker = Walker(self, velocity_fn, params, schedule, conditioning, keys, deal.first[0], len(deal.sample))
        data = walker.tails(walker.roots(shape))
        own = walker.numbers(self.group_size)
        time, noise = jax.vmap(lambda key: self._pairs(key, own, shape))(keys)
        latents = noised(jnp.broadcast_to(data[:, :, None], noise.shape), noise, time)
        states = data.shape[:2]
        sample = jnp.broadcast_to(own, states)[..., None]
        noised_samples = Noised(data, latents, noise, time, jnp.zeros(states, jnp.int32), sample)
        return Rollout((noised_samples,), data.reshape(-1, *shape))

    def _pairs(self, key: chex.PRNGKey, samples: chex.Array, shape: tuple[int, int]) -> tuple[chex.Array, chex.Array]:
        """Times `[S, C]` and noises `[S, C, N, D]` of so many samples of a rollout."""
        assert self.draw  # a plan that learns has it
        draw, key = self.draw, jax.random.fold_in(key, _PAIRS)

        def of_one(key: chex.PRNGKey) -> tuple[chex.Array, chex.Array]:
            for_times, for_noise = jax.random.split(key)
            return draw(for_times, self.learns_at, self.pairs), jax.random.normal(for_noise, (self.pairs, *shape))

        if self.shares_pairs:
            alike = of_one(key)
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(samples), *x.shape)), alike)
        return jax.vmap(lambda number: of_one(jax.random.fold_in(key, number)))(samples)

    @property
    def _sizes(self) -> tuple[int, ...]:
        return (1,)

    def _places(self, children: int, members: int) -> tuple[np.ndarray, np.ndarray]:
        """See `TreePlan`: each sample is of one worker."""
        del children
        share = self.group_size // members
        return np.arange(self.group_size) // share, np.arange(self.group_size) % share

    def credit(self, normalise: Normalise, values: Any, came: chex.Array) -> chex.Array:
        """See `Plan`: of each sample."""
        return Plan.credit(self, normalise, values, came)

    def step_weights(self, kind: StepWeights) -> np.ndarray:
        """1, `[1]`."""
        del kind
        return np.ones(1)

    def objective(self, config: LearnerConfig) -> Objective:
        """See `Plan`."""
        for key, expected in (("objective", "clip"), ("step_weights", "none")):
            if (found := getattr(config, key)) != expected:
                raise ConfigError(
                    f"learner.{key}", found, f"{expected!r}: samples of this algorithm take no random steps"
                )
        if config.reference_weight and config.reference_in != "velocity":
            raise ConfigError("learner.reference_in", config.reference_in, "'velocity': there are no random steps")
        assert self.make_objective  # a plan that learns has it
        return self.make_objective(config)
