"""From transitions and advantages to new parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Count, Decay, Range, check
from egrpo_jax.flow.solver import VelocityFn
from egrpo_jax.flow.transition import log_prob
from egrpo_jax.rl.loss import LossStats, clipped_ratio_loss
from egrpo_jax.rl.rollout import Transitions, group_kernel


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """The config section `learner`.

    Attributes:
      schedule: "joint" averages the loss over the active steps and updates once (the paper); "per_active_step" makes
        one update for each active step, in order, the later ones off-policy (the E-GRPO and G2RPO codes).
      clip_range: the ratio is clipped to 1 plus or minus this; float32 tells nothing below 1e-7 from 1.
      advantage_clip: advantages are clipped to plus or minus this.
      micro_batch: states in one forward and backward pass on one device, gradients being accumulated over the rest;
        None for all.
      ema_decay: of the parameters' exponential moving average, once an iteration, which is then what is evaluated; None
        keeps none.
    """

    schedule: Literal["joint", "per_active_step"] = "joint"
    clip_range: Annotated[float, Range(1e-7, 1000)] = 1e-4
    advantage_clip: Annotated[float, Range(1e-3, 10**6)] = 5.0
    micro_batch: Count | None = None
    ema_decay: Decay | None = None

    def __post_init__(self) -> None:
        check(self)


class TrainState(NamedTuple):
    """What training changes; `ema` is None where no average is kept."""

    params: Any
    opt_state: Any
    ema: Any


class UpdateStats(NamedTuple):
    """Statistics of an iteration's U optimizer updates, each `[U]`."""

    loss: LossStats
    grad_norm: chex.Array
    update_norm: chex.Array


def init_state(params: Any, optimizer: optax.GradientTransformation, config: LearnerConfig) -> TrainState:
    """The state before the first update."""
    ema = None if config.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(params, optimizer.init(params), ema)


def policy_loss(
    velocity_fn: VelocityFn,
    params: Any,
    transitions: Transitions,
    advantage: chex.Array,
    conditioning: Any,
    config: LearnerConfig,
) -> tuple[chex.Array, LossStats]:
    """The clipped loss of K states with S samples each, by one forward pass of batch K.

    Args:
      velocity_fn, params: the model.
      transitions: without the axis E: `[K, ...]`.
      advantage: `[K, S]`.
      conditioning: pytree with leading axis K.
    """
    velocity = velocity_fn(params, transitions.latents, transitions.time, conditioning)
    kernel = group_kernel(transitions.latents, velocity, transitions.time, transitions.next_time, transitions.sigma)
    scored = log_prob(kernel, transitions.next_latents)
    return clipped_ratio_loss(scored, transitions.log_prob, advantage, config.clip_range, config.advantage_clip)


def update(
    velocity_fn: VelocityFn,
    optimizer: optax.GradientTransformation,
    config: LearnerConfig,
    state: TrainState,
    transitions: Transitions,
    advantage: chex.Array,
    conditioning: Any,
    axis_name: str | None = None,
) -> tuple[TrainState, UpdateStats]:
    """One iteration's optimizer updates.

    Args:
      velocity_fn: the model.
      optimizer: see `make_optimizer`.
      state: parameters, optimizer state and average.
      transitions, advantage: `[E, K, ...]` and `[E, K, S]`.
      conditioning: pytree with leading axis K.
      axis_name: the mapped axis over which K is spread, inside shard_map; gradients are averaged over it.
    """
    num_active, num_states = advantage.shape[:2]
    micro_batch = config.micro_batch or num_states
    if num_states % micro_batch:
        raise ConfigError("learner.micro_batch", micro_batch, f"a divisor of the {num_states} prompts on each device")
    num_updates = num_active if config.schedule == "per_active_step" else 1

    def split(x: chex.Array) -> chex.Array:
        return x.reshape(num_updates, -1, micro_batch, *x.shape[2:])

    chunks = jax.tree.map(lambda x: x.reshape(-1, micro_batch, *x.shape[1:]), conditioning)
    chunk_of = jnp.tile(jnp.arange(num_states // micro_batch), num_active).reshape(num_updates, -1)

    def gradient(params: Any, batch: tuple[Transitions, chex.Array, chex.Array]) -> tuple[Any, LossStats]:
        micro_transitions, micro_advantage, chunk = batch
        micro_conditioning = jax.tree.map(lambda x: x[chunk], chunks)
        loss = lambda p: policy_loss(velocity_fn, p, micro_transitions, micro_advantage, micro_conditioning, config)
        return jax.grad(loss, has_aux=True)(params)

    def optimizer_step(carry: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], UpdateStats]:
        params, opt_state = carry
        grads, loss = _mean_gradient(lambda micro: gradient(params, micro), batch, params, axis_name)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        stats = UpdateStats(loss, optax.tree.norm(grads), optax.tree.norm(updates))
        return (optax.apply_updates(params, updates), opt_state), stats

    batches = (jax.tree.map(split, transitions), split(advantage), chunk_of)
    (params, opt_state), stats = jax.lax.scan(optimizer_step, (state.params, state.opt_state), batches)
    ema = None if config.ema_decay is None else optax.incremental_update(params, state.ema, 1 - config.ema_decay)
    return TrainState(params, opt_state, ema), stats


def _mean_gradient(
    gradient: Callable[[Any], tuple[Any, LossStats]], batch: Any, params: Any, axis_name: str | None
) -> tuple[Any, LossStats]:
    """Mean of `gradient` over the leading axis of `batch` and over devices; NaN throughout if the loss is not finite.

    A loss may be infinite where its gradient is finite; poisoning the gradient leaves the optimizer one thing to test.
    """
    length = batch[1].shape[0]

    def add(total: Any, micro: Any) -> tuple[Any, LossStats]:
        grads, stats = gradient(micro)
        return jax.tree.map(jnp.add, total, grads), stats

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)  # bfloat16 would lose small gradients
    total, stats = jax.lax.scan(add, zeros, batch)
    grads = jax.tree.map(lambda g: g / length, total)
    worst = stats.ratio_deviation.max()
    mean = jax.tree.map(jnp.mean, stats)
    if axis_name is not None:
        grads, mean = jax.lax.pmean((grads, mean), axis_name)
        worst = jax.lax.pmax(worst, axis_name)
    grads = jax.tree.map(lambda g: jnp.where(jnp.isfinite(mean.loss), g, jnp.nan), grads)
    return grads, mean._replace(ratio_deviation=worst)
