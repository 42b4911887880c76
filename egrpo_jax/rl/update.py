"""From transitions and advantages to new parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from egrpo_jax.common.ranges import Count, Decay, Range, check
from egrpo_jax.flow.solver import VelocityFn
from egrpo_jax.flow.transition import log_prob
from egrpo_jax.rl.loss import LossStats, clipped_ratio_loss
from egrpo_jax.rl.rollout import Transitions, group_kernel


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """The config section `learner`.

    Attributes:
      updates: "joint" averages the loss over the active steps and updates once (the paper); "per_active_step" makes
        one update for each active step, in order, the later ones off-policy (the E-GRPO and G2RPO codes).
      clip_range: the ratio is clipped to 1 plus or minus this; float32 tells nothing below 1e-7 from 1.
      advantage_clip: advantages are clipped to plus or minus this.
      micro_batch: states in one forward and backward pass on one device, gradients being accumulated over the rest;
        None for all.
      ema_decay: of the parameters' exponential moving average, once an iteration, which is then what is evaluated; None
        keeps none.
    """

    updates: Literal["joint", "per_active_step"] = "joint"
    clip_range: Annotated[float, Range(1e-7, 1000)] = 1e-4
    advantage_clip: Annotated[float, Range(1e-3, 10**6)] = 5.0
    micro_batch: Count | None = None
    ema_decay: Decay | None = None

    def __post_init__(self) -> None:
        check(self)


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
    """Statistics of an iteration's U optimizer updates, each `[U]`.

    `rollout_deviation` is the largest |r - 1| between the log-densities of the rollout and those of the update's own
    forward pass; only of the first update is it at the same parameters.
    """

    loss: LossStats
    rollout_deviation: chex.Array
    grad_norm: chex.Array
    update_norm: chex.Array


class _Batch(NamedTuple):
    """States `[B, ...]` for one forward and backward pass, and which chunk of B prompts they are of."""

    transitions: Transitions
    advantage: chex.Array
    old_log_prob: chex.Array | None
    chunk: chex.Array


_Stats = tuple[LossStats, chex.Array]
"""Of a loss, and the largest |r - 1| against the rollout's own log-densities."""
_Gradient = Callable[[Any, _Batch], tuple[Any, _Stats]]


def init_state(params: Any, optimizer: optax.GradientTransformation, config: LearnerConfig) -> TrainState:
    """The state before the first update."""
    ema = None if config.ema_decay is None else jax.tree.map(jnp.copy, params)
    return TrainState(params, optimizer.init(params), ema, Skipped(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)))


def policy_log_prob(velocity_fn: VelocityFn, params: Any, transitions: Transitions, conditioning: Any) -> chex.Array:
    """The log-densities `[B, G]` of the samples of B states, by one forward pass of batch B.

    Args:
      velocity_fn, params: the model.
      transitions: with one leading axis in place of P and E: `[B, ...]`.
      conditioning: pytree with leading axis B.
    """
    velocity = velocity_fn(params, transitions.latents, transitions.time, conditioning)
    kernel = group_kernel(transitions.latents, velocity, transitions.time, transitions.next_time, transitions.sigma)
    return log_prob(kernel, transitions.next_latents)


def policy_loss(
    scored: chex.Array, old_log_prob: chex.Array | None, advantage: chex.Array, config: LearnerConfig
) -> tuple[chex.Array, LossStats]:
    """The clipped loss of samples `[B, G]`, of log-density `scored`.

    The old log-densities are those of this very forward pass before the first update: in bfloat16 another program (the
    rollout's, of another batch) rounds differently, by several times a clip range of 1e-4. So with None, for
    parameters that have not moved since the rollout, `scored` is its own past, and the ratio is 1 by construction.
    """
    old = jax.lax.stop_gradient(scored) if old_log_prob is None else old_log_prob
    return clipped_ratio_loss(scored, old, advantage, config.clip_range, config.advantage_clip)


def update_policy(
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

    Before the first of several, one forward pass of each state takes the old log-densities. Compile this without excess
    precision (`parallel.mesh.spread` does): only then do passes of equal shapes round equally.

    Args:
      velocity_fn: the model.
      optimizer: see `make_optimizer`.
      state: parameters, optimizer state and average.
      transitions, advantage: `[P, E, ...]` and `[P, E, G]`.
      conditioning: pytree with leading axis P.
      axis_name: the mapped axis over which P is spread, inside shard_map; gradients are averaged over it.
    """
    micro_batch = config.micro_batch or len(advantage)
    if len(advantage) % micro_batch:
        raise ValueError(f"a micro-batch of {micro_batch} states does not divide {len(advantage)} prompts")
    batches = _micro_batches(transitions, advantage, micro_batch, config)
    chunks = jax.tree.map(lambda x: x.reshape(-1, micro_batch, *x.shape[1:]), conditioning)

    def score(params: Any, batch: _Batch) -> chex.Array:
        return policy_log_prob(velocity_fn, params, batch.transitions, jax.tree.map(lambda x: x[batch.chunk], chunks))

    def loss(params: Any, batch: _Batch) -> tuple[chex.Array, _Stats]:
        scored = score(params, batch)
        value, stats = policy_loss(scored, batch.old_log_prob, batch.advantage, config)
        return value, (stats, jnp.abs(jnp.expm1(scored - batch.transitions.log_prob)).max())

    if len(batches.advantage) > 1:
        old = jax.lax.map(lambda part: jax.lax.map(lambda batch: score(state.params, batch), part), batches)
        batches = batches._replace(old_log_prob=old)
    step = functools.partial(_optimizer_step, optimizer, jax.grad(loss, has_aux=True), axis_name)
    new, stats = jax.lax.scan(step, state, batches)
    if config.ema_decay is not None:
        new = new._replace(ema=optax.incremental_update(new.params, state.ema, 1 - config.ema_decay))
    return new, stats


def _micro_batches(transitions: Transitions, advantage: chex.Array, micro_batch: int, config: LearnerConfig) -> _Batch:
    """All states as `[U, M, B, ...]`: U updates, M micro-batches of each, B states of one active step."""
    num_prompts, num_active = advantage.shape[:2]
    num_updates = num_active if config.updates == "per_active_step" else 1
    split = lambda x: x.swapaxes(0, 1).reshape(num_updates, -1, micro_batch, *x.shape[2:])
    chunk = jnp.tile(jnp.arange(num_prompts // micro_batch), num_active).reshape(num_updates, -1)
    return _Batch(jax.tree.map(split, transitions), split(advantage), None, chunk)


def _optimizer_step(
    optimizer: optax.GradientTransformation,
    gradient: _Gradient,
    axis_name: str | None,
    state: TrainState,
    batch: _Batch,
) -> tuple[TrainState, UpdateStats]:
    """One update by the micro-batches `[M, B, ...]` of `batch`; not applied where it would leave a nan or infinity."""
    params, opt_state, ema, skipped = state
    grads, (loss, rollout) = _mean_gradient(lambda micro: gradient(params, micro), batch, params, axis_name)
    updates, new_opt_state = optimizer.update(grads, opt_state, params)
    new = (optax.apply_updates(params, updates), new_opt_state)
    # A finite gradient may have an infinite update, and a finite update may overflow what a parameter is stored in.
    sound = _all_finite((loss.loss, new))
    params, opt_state = jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, (params, opt_state))
    skipped = Skipped(jnp.where(sound, 0, skipped.in_a_row + 1), skipped.in_all + ~sound)
    stats = UpdateStats(loss, rollout, optax.tree.norm(grads), optax.tree.norm(updates))
    return TrainState(params, opt_state, ema, skipped), stats


def _all_finite(tree: Any) -> chex.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _mean_gradient(
    gradient: Callable[[_Batch], tuple[Any, _Stats]], batch: _Batch, params: Any, axis_name: str | None
) -> tuple[Any, _Stats]:
    """The mean of `gradient` over the leading axis of `batch` and over devices, with the statistics likewise."""

    def add(total: Any, micro: _Batch) -> tuple[Any, _Stats]:
        grads, stats = gradient(micro)
        return jax.tree.map(jnp.add, total, grads), stats

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)  # bfloat16 would lose small gradients
    total, (stats, rollout) = jax.lax.scan(add, zeros, batch)
    grads = jax.tree.map(lambda g: g / len(batch.advantage), total)
    mean, largest = jax.tree.map(jnp.mean, stats), (stats.ratio_deviation.max(), rollout.max())
    if axis_name is not None:
        grads, mean = jax.lax.pmean((grads, mean), axis_name)
        largest = jax.lax.pmax(largest, axis_name)
    return grads, (mean._replace(ratio_deviation=largest[0]), largest[1])
