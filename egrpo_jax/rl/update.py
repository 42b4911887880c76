"""From transitions and advantages to new parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Count, Decay, Range, check
from egrpo_jax.flow.process import Process
from egrpo_jax.flow.solver import VelocityFn
from egrpo_jax.flow.transition import Kernel, kl_divergence, log_prob
from egrpo_jax.rl.apply import apply_gradient
from egrpo_jax.rl.deal import States
from egrpo_jax.rl.loss import LossStats, clipped_ratio_loss, kl_masked_loss, total_loss
from egrpo_jax.rl.plan import StepWeights
from egrpo_jax.rl.transitions import Transitions, group_kernel


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """The config section `learner`.

    Attributes:
      updates: "joint" averages the loss over the active steps and updates once (the paper); "per_active_step" makes
        one update for each active step, in order, the later ones off-policy (the E-GRPO and G2RPO codes).
      epochs: how often these are made of one rollout, the ratio being always to the policy that sampled.
      step_weights: of the active steps' losses, of which late ones weigh more. "none": as they are (the paper);
        "noise": times the step's std, of mean 1 (TempFlow-GRPO); "flat": all weigh alike, whatever the process
        (GRPO-Guard, Precise): the ratio is that of the densities but for its drift, to the power of the std.
      objective: where a sample's gradient ends. "clip": the ratio has left 1 by `clip_range`; "kl_mask": it goes on
        leaving 1 while the step's KL divergence from the policy that sampled is beyond `kl_limit` (Flow-DPPO).
      clip_range: the ratio is clipped to 1 plus or minus this; float32 tells nothing below 1e-7 from 1. The published
        ranges for "flat" are 2e-6 and 4e-6.
      kl_limit: of "kl_mask", averaged over latent dimensions.
      advantage_clip: advantages are clipped to plus or minus this.
      micro_batch: states in one forward and backward pass on one device, gradients being accumulated over the rest;
        None for all, which saves the memory of one copy of the gradients, and takes that of all activations.
      ema_decay: of the parameters' exponential moving average, once an iteration, which is then what is evaluated; None
        keeps none.
    """

    updates: Literal["joint", "per_active_step"] = "joint"
    epochs: Count = 1
    step_weights: StepWeights = "none"
    objective: Literal["clip", "kl_mask"] = "clip"
    clip_range: Annotated[float, Range(1e-7, 1000)] = 1e-4
    kl_limit: Annotated[float, Range(1e-12, 1000)] = 1e-5
    advantage_clip: Annotated[float, Range(1e-3, 10**6)] = 5.0
    micro_batch: Count | None = None
    ema_decay: Decay | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.objective == "clip" and self.kl_limit != LearnerConfig.kl_limit:
            raise ConfigError("kl_limit", self.kl_limit, "objective 'kl_mask', which alone has a limit")

    def updates_of_epoch(self, num_active: int) -> int:
        """Optimizer updates of an epoch with `num_active` active steps."""
        return num_active if self.updates == "per_active_step" else 1

    def is_scored(self, num_active: int) -> bool:
        """True if an iteration has several updates, before which the old log-densities are taken."""
        return self.epochs * self.updates_of_epoch(num_active) > 1

    @property
    def needs_kl(self) -> bool:
        """True if the loss takes the KL divergence from the policy that sampled, hence its mean."""
        return self.step_weights == "flat" or self.objective == "kl_mask"


class Skipped(NamedTuple):
    """Updates that were not applied because they would not have left everything finite: in a row up to now, in all."""

    in_a_row: chex.Array
    in_all: chex.Array


class TrainState(NamedTuple):
    """The state that training changes; `ema` is None where no average is kept."""

    params: Any
    opt_state: Any
    ema: Any
    skipped: Skipped


class UpdateStats(NamedTuple):
    """Statistics of an iteration's U optimizer updates in each of K epochs, each `[K U]`.

    `rollout_deviation` is the largest |r - 1| between the log-densities of the rollout and those of the update's own
    forward pass; only of the first update is it at the same parameters.
    """

    loss: LossStats
    rollout_deviation: chex.Array
    grad_norm: chex.Array
    update_norm: chex.Array


class Scored(NamedTuple):
    """A policy's view of G samples of each state: their log-densities `[..., G]`, and the Gaussian that they are of.

    `kernel` has a mean `[..., 1, N, D]`; None where it is not needed.
    """

    log_prob: chex.Array
    kernel: Kernel | None


class Batch(NamedTuple):
    """Trained states, in micro-batches of B for one forward and backward pass; leading axes `[U, M, B]`, or the last.

    Attributes:
      prompt: the row of the conditioning that a state belongs to.
      weight: of each state; sums to 1 over all workers' states of an update, of all its batches.
      step_weight: the factor of its loss.
      transitions, advantage: of G samples of each state.
      old: of these, at the parameters that sampled; None where an update is at just these.
    """

    prompt: chex.Array
    weight: chex.Array
    step_weight: chex.Array
    transitions: Transitions
    advantage: chex.Array
    old: Scored | None = None


class StepStats(NamedTuple):
    """Of a micro-batch, a worker, or an update: the loss, and the largest |r - 1| against the rollout's log-densities.

    All is summed over the parts but what is a maximum, as `LossStats` says.
    """

    loss: LossStats
    rollout_deviation: chex.Array


Batches = tuple[Batch, ...]
"""Of each block of transitions a batch."""
Scorer = Callable[[Any, Batch], Scored]
"""`(params, batch [M, B]) -> of its samples [M, B, G]`, with a kernel where the loss needs it."""
Gradient = Callable[[Any, Batches], tuple[Any, StepStats]]
"""`(params, batches [M, B]) -> (gradient of the loss, float32, its statistics)`, over all workers."""


def init_state(params: Any, optimizer: optax.GradientTransformation, config: LearnerConfig) -> TrainState:
    """The state before the first update."""
    ema = None if config.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(params, optimizer.init(params), ema, Skipped(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)))


def score_samples(
    velocity_fn: VelocityFn, process: Process, params: Any, transitions: Transitions, conditioning: Any
) -> Scored:
    """The log-densities `[B, G]` of the samples of B states and their kernel, by one forward pass of batch B.

    Args:
      velocity_fn, params: the model.
      process: the kernel that the samples were drawn from.
      transitions: with one leading axis in place of P and E: `[B, ...]`.
      conditioning: pytree with leading axis B.
    """
    velocity = velocity_fn(params, transitions.latents, transitions.time, conditioning)
    times = transitions.time, transitions.next_time, transitions.noise
    kernel = group_kernel(process, transitions.latents, velocity, *times)
    return Scored(log_prob(kernel, transitions.next_latents), kernel)


def take_batch(
    transitions: Transitions, advantage: chex.Array, step_weights: chex.Array | np.ndarray, states: States
) -> Batch:
    """The trained `states [U, M, B]` of a worker's transitions, one block of them, and their advantages.

    Args:
      transitions: `[P, M, S]`.
      advantage: of each random step and sample, `[P, K, G]`, see `Plan.credit`.
      step_weights: `[K]`, see `Plan.step_weights`.
      states: which of them, of `deal_states`.
    """
    taken = jax.tree.map(lambda x: x[states.prompt, states.state], transitions)
    of_samples = advantage[states.prompt[..., None], taken.step[..., None], taken.sample]
    of_steps = jnp.asarray(step_weights, jnp.float32)[taken.step]
    return Batch(states.prompt, states.weight, of_steps, taken, of_samples)


def score_batch(
    velocity_fn: VelocityFn, process: Process, config: LearnerConfig, params: Any, conditioning: Any, batch: Batch
) -> Scored:
    """Log-densities `[M, B, G]` of the samples of `batch [M, B]` at `params`, with the kernel where the loss needs it.

    Args:
      velocity_fn, params: the model.
      process: the kernel that the samples were drawn from.
      conditioning: pytree with leading axis P.
      batch: see `take_batch`.
    """

    def score(micro: Batch) -> Scored:
        scored = _score(velocity_fn, process, params, conditioning, micro)
        return scored if config.needs_kl else scored._replace(kernel=None)

    return jax.lax.map(score, batch)


def policy_gradient(
    velocity_fn: VelocityFn, process: Process, config: LearnerConfig, params: Any, conditioning: Any, batches: Batches
) -> tuple[Any, StepStats]:
    """The gradient of the loss of a worker's states `[M, B]` and its statistics, summed over micro-batches.

    Args:
      velocity_fn, params: the model.
      process: the kernel that the samples were drawn from.
      conditioning: pytree with leading axis P.
      batches: see `take_batch`. Without those at old parameters the ratio is 1 by construction.

    Returns:
      The gradient, in float32, and statistics.
    """

    def loss(params: Any, micro: Batch) -> tuple[chex.Array, StepStats]:
        scored = _score(velocity_fn, process, params, conditioning, micro)
        weight = micro.weight[:, None] / micro.advantage.shape[1]
        value, stats = policy_loss(config, scored, micro.old, micro.advantage, weight, micro.step_weight[:, None])
        deviation = jnp.abs(jnp.expm1(scored.log_prob - micro.transitions.log_prob))
        return value, StepStats(stats, deviation.max(initial=0.0, where=weight > 0))

    # Added up in place, also within a scan over blocks: else each micro-batch makes a gradient of its own first. In
    # float32, since bfloat16 would lose small gradients.
    params = optax.tree.cast(params, jnp.float32)
    total = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), params)

    def add(_: None, micro: Batch) -> tuple[None, StepStats]:
        pullback: Any  # whose type does not tell of its method
        value, pullback, stats = jax.vjp(lambda params: loss(params, micro), params, has_aux=True)
        pullback.with_refs(total)(jnp.ones_like(value))
        return None, stats

    parts = [jax.lax.scan(add, None, batch)[1] for batch in batches]
    stats = jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts)
    return jax.tree.map(jax.freeze, total), add_stats(stats)


def add_stats(parts: StepStats) -> StepStats:
    """The statistics of parts along a leading axis as those of the whole."""
    total, largest = jax.tree.map(lambda x: x.sum(0), parts.loss), parts.loss.ratio_deviation.max(0)
    return StepStats(total._replace(ratio_deviation=largest), parts.rollout_deviation.max(0))


def _score(velocity_fn: VelocityFn, process: Process, params: Any, conditioning: Any, micro: Batch) -> Scored:
    own = jax.tree.map(lambda x: x[micro.prompt], conditioning)
    return score_samples(velocity_fn, process, params, micro.transitions, own)


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
        assert old.kernel  # `score_batch` keeps it then
        kl = kl_divergence(old.kernel, new.kernel)
        if config.step_weights == "flat":
            exponent = (log_ratio + kl) * new.kernel.std[..., 0, 0]
    ratio = jnp.exp(exponent)
    if config.objective == "clip":
        samples = clipped_ratio_loss(ratio, advantage, config.clip_range)
    else:
        samples = kl_masked_loss(ratio, advantage, kl, config.kl_limit)
    return total_loss(samples, ratio, log_ratio, weight, step_weight)


def update_policy(
    score: Scorer,
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    config: LearnerConfig,
    state: TrainState,
    batches: Batches,
) -> tuple[TrainState, UpdateStats]:
    """One iteration's optimizer updates: those of `batches` in order, in each of `config.epochs`.

    Before the first of several, one forward pass of each state takes the old log-densities, and the old means where
    the loss needs them. Compile this without excess precision (`parallel.mesh.EXACT`): only then do passes of equal
    shapes round equally.

    Args:
      score, gradient: of all workers together; a single one has `score_batch` and `policy_gradient`.
      optimizer: see `make_optimizer`.
      state: parameters, optimizer state and average.
      batches: the trained states of all workers, `[U, M, B]`.
    """
    updates = len(batches[0].weight)
    if config.epochs * updates > 1:
        with jax.named_scope("old_log_probabilities"):
            of_all = lambda batch: jax.lax.map(lambda batch: score(state.params, batch), batch)
            batches = tuple(batch._replace(old=of_all(batch)) for batch in batches)

    def update(state: TrainState, index: chex.Array) -> tuple[TrainState, UpdateStats]:
        current = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batches)
        return _optimizer_step(optimizer, gradient, state, current)

    new, stats = jax.lax.scan(update, state, jnp.tile(jnp.arange(updates), config.epochs))
    if config.ema_decay is not None:
        new = new._replace(ema=optax.incremental_update(new.params, state.ema, 1 - config.ema_decay))
    return new, stats


def _optimizer_step(
    optimizer: optax.GradientTransformation, gradient: Gradient, state: TrainState, batches: Batches
) -> tuple[TrainState, UpdateStats]:
    """One update by `batches [M, B]`; not applied where it would leave a nan or infinity."""
    params, opt_state, ema, skipped = state
    with jax.named_scope("gradient"):
        grads, stats = gradient(params, batches)
    norm = optax.tree.norm(grads)
    params, opt_state, sound, update_norm = apply_gradient(optimizer, stats.loss.loss, norm, grads, opt_state, params)
    skipped = Skipped(jnp.where(sound, 0, skipped.in_a_row + 1), skipped.in_all + ~sound)
    return TrainState(params, opt_state, ema, skipped), UpdateStats(*stats, norm, update_norm)
