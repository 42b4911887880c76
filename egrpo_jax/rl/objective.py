"""Objectives: how a policy's view of trained states becomes a loss."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.flow.process import Process
from egrpo_jax.flow.solver import VelocityFn
from egrpo_jax.flow.transition import Kernel, kl_divergence, log_prob
from egrpo_jax.rl.forward import velocity_penalty
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.loss import LossStats, clipped_ratio_loss, kl_masked_loss, total_loss
from egrpo_jax.rl.transitions import Transitions, group_kernel


class Scored(NamedTuple):
    """A policy's view of the samples of each state; what its objective does not need is None.

    Attributes:
      log_prob: their log-densities, `[..., S]`.
      kernel: the Gaussian that these are of, its mean `[..., 1, N, D]`.
      velocity: at the state, `[..., N, D]`.
    """

    log_prob: chex.Array
    kernel: Kernel | None = None
    velocity: chex.Array | None = None


class Batch(NamedTuple):
    """Trained states, in micro-batches of B for one forward and backward pass; leading axes `[U, M, B]`, or the last.

    Attributes:
      prompt: the row of the conditioning that a state belongs to.
      weight: of each state; sums to 1 over all workers' states of an update, of all its batches.
      step_weight: the factor of its loss.
      states: themselves: `Transitions`, or what else the plan's objective takes.
      advantage: of S samples of each.
      old: these as the policy that sampled sees them; None where an update is at just its parameters.
      reference, trailing: as the copies of the parameters see them; None where the loss does not refer to them.
    """

    prompt: chex.Array
    weight: chex.Array
    step_weight: chex.Array
    states: Any
    advantage: chex.Array
    old: Scored | None = None
    reference: Scored | None = None
    trailing: Scored | None = None


class Objective(abc.ABC):
    """The loss of trained states under a policy."""

    @abc.abstractmethod
    def score(self, velocity_fn: VelocityFn, params: Any, states: Any, conditioning: Any) -> Scored:
        """The view that the policy `params` has of B states, with as much as `loss` needs.

        Args:
          velocity_fn, params: the model.
          states: with the leading axis B, as its conditioning.
        """

    @abc.abstractmethod
    def loss(self, new: Scored, batch: Batch, weight: chex.Array) -> tuple[chex.Array, LossStats]:
        """The loss of B states, `new` being the view of the policy that learns, and its statistics.

        `weight [B, 1]` is that of each sample.
        """

    def deviation(self, new: Scored, batch: Batch) -> chex.Array:
        """|r - 1| of the samples `[B, S]` between the rollout's log-densities and `new`; 0 where it took none."""
        del batch
        return jnp.zeros_like(new.log_prob)


@dataclasses.dataclass(frozen=True)
class PolicyRatio(Objective):
    """The objectives of random steps: of the ratio of their densities under the policy and the one that sampled.

    Attributes:
      process: the kernel that the samples were drawn from.
      config: the section `learner`.
    """

    process: Process
    config: LearnerConfig

    def score(self, velocity_fn: VelocityFn, params: Any, states: Transitions, conditioning: Any) -> Scored:
        """See `Objective`: log-densities `[B, S]`, and the kernel and velocity if the loss takes a distance of them."""
        scored = score_samples(velocity_fn, self.process, params, states, conditioning)
        in_mean = self.config.reference_weight > 0 and self.config.reference_in == "mean"
        in_velocity = self.config.trailing_weight > 0 or (self.config.reference_weight > 0 and not in_mean)
        return scored._replace(
            kernel=scored.kernel if self.config.needs_kl or in_mean else None,
            velocity=scored.velocity if in_velocity else None,
        )

    def loss(self, new: Scored, batch: Batch, weight: chex.Array) -> tuple[chex.Array, LossStats]:
        """See `Objective`, and `policy_loss`."""
        step_weight = batch.step_weight[:, None]
        value, stats = policy_loss(self.config, new, batch.old, batch.advantage, weight, step_weight)
        return add_penalty(self.config, new, batch, value, stats)

    def deviation(self, new: Scored, batch: Batch) -> chex.Array:
        """See `Objective`."""
        return jnp.abs(jnp.expm1(new.log_prob - batch.states.log_prob))


def add_penalty(
    config: LearnerConfig, new: Scored, batch: Batch, value: chex.Array, stats: LossStats
) -> tuple[chex.Array, LossStats]:
    """A loss with the distances from the copies of the parameters, as the section `learner` weighs them."""
    for weight, other, in_mean in (
        (config.reference_weight, batch.reference, config.reference_in == "mean"),
        (config.trailing_weight, batch.trailing, False),
    ):
        if weight:
            assert other  # `update_policy` scores it then
            distance = _distance(new, other, in_mean)
            total = jnp.sum(batch.weight * distance, where=batch.weight > 0)
            value, stats = value + weight * total, stats._replace(penalty=stats.penalty + weight * total)
    return value, stats._replace(loss=value)


def _distance(new: Scored, other: Scored, in_mean: bool) -> chex.Array:
    """Of two policies at each of B states."""
    if in_mean:
        assert new.kernel
        assert other.kernel  # `score` keeps it then
        return kl_divergence(new.kernel, jax.lax.stop_gradient(other.kernel))[..., 0]
    apart = velocity_penalty(new.velocity, other.velocity)
    return apart.reshape(len(apart), -1).mean(-1)


def score_samples(
    velocity_fn: VelocityFn, process: Process, params: Any, transitions: Transitions, conditioning: Any
) -> Scored:
    """All of the view that a policy has of the samples of B states, by one forward pass of batch B.

    Args:
      velocity_fn, params: the model.
      process: the kernel that the samples were drawn from.
      transitions: with one leading axis in place of P and M: `[B, ...]`.
      conditioning: pytree with leading axis B.
    """
    velocity = velocity_fn(params, transitions.latents, transitions.time, conditioning)
    times = transitions.time, transitions.next_time, transitions.noise
    kernel = group_kernel(process, transitions.latents, velocity, *times)
    return Scored(log_prob(kernel, transitions.next_latents), kernel, velocity)


def policy_loss(
    config: LearnerConfig,
    new: Scored,
    old: Scored | None,
    advantage: chex.Array,
    weight: chex.Array | None = None,
    step_weight: chex.Array | float = 1.0,
) -> tuple[chex.Array, LossStats]:
    r"""The loss of samples `[B, G]`, of ratio r = p/p_old, or with step weights "flat" (GRPO-Guard, arXiv:2510.22319)

        r = exp((log p - log p_old + b) std),      b = mean((m - m_old)^2) / (2 std^2) = KL(p_old | p).

    Means and log-densities are over latent dimensions. A sample m_old + std e has log p - log p_old = z e - b for
    z = (m - m_old)/std: b takes away the drift, and the std makes the spread that of m, alike at every step.

    The old log-densities are those of this very forward pass before the first update: in bfloat16 another program (the
    rollout's, of another batch) rounds differently, by several times a clip range of 1e-4. So with None, for
    parameters that have not moved since the rollout, `new` is its own past, and the ratio is 1 by construction.
    """
    old = jax.lax.stop_gradient(new) if old is None else old
    advantage = jnp.clip(advantage, -config.advantage_clip, config.advantage_clip)
    log_ratio = new.log_prob - old.log_prob
    exponent, kl = log_ratio, jnp.zeros(())
    if config.needs_kl:
        assert new.kernel
        assert old.kernel  # `score` keeps it then
        kl = kl_divergence(old.kernel, new.kernel)
        if config.step_weights == "flat":
            exponent = (log_ratio + kl) * new.kernel.std[..., 0, 0]
    ratio = jnp.exp(exponent)
    if config.objective == "clip":
        samples = clipped_ratio_loss(ratio, advantage, config.clip_range)
    else:
        samples = kl_masked_loss(ratio, advantage, kl, config.kl_limit)
    return total_loss(samples, ratio, log_ratio, weight, step_weight)
