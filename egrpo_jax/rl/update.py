"""From transitions and advantages to new parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from egrpo_jax.flow.solver import VelocityFn
from egrpo_jax.rl.apply import apply_gradient
from egrpo_jax.rl.deal import States
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.loss import LossStats
from egrpo_jax.rl.objective import Batch, Objective, Scored


class Skipped(NamedTuple):
    """Updates that were not applied because they would not have left everything finite: in a row up to now, in all."""

    in_a_row: chex.Array
    in_all: chex.Array


class TrainState(NamedTuple):
    """The state that training changes.

    Attributes:
      params, opt_state: the parameters and the optimizer's state.
      ema: their moving average; None where none is kept, as for the others.
      skipped: updates that were not applied.
      reference: the parameters before the first update.
      trailing: another average, that the loss or the rollout refers to.
    """

    params: Any
    opt_state: Any
    ema: Any
    skipped: Skipped
    reference: Any = None
    trailing: Any = None


class UpdateStats(NamedTuple):
    """Statistics of an iteration's U optimizer updates in each of K epochs, each `[K U]`.

    `rollout_deviation` is the largest |r - 1| between the log-densities of the rollout and those of the update's own
    forward pass; only of the first update is it at the same parameters.
    """

    loss: LossStats
    rollout_deviation: chex.Array
    grad_norm: chex.Array
    update_norm: chex.Array


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
    copy = lambda wanted: jax.tree.map(jnp.copy, params) if wanted else None
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        ema=copy(config.ema_decay is not None),
        skipped=Skipped(zero, zero),
        reference=copy(config.reference_weight > 0),
        trailing=copy(config.trailing_decay is not None),
    )


def take_batch(transitions: Any, advantage: chex.Array, step_weights: chex.Array | np.ndarray, states: States) -> Batch:
    """The trained `states [U, M, B]` of a worker's transitions, one block of them, and their advantages.

    Args:
      transitions: `[P, M, S]`, or what else the plan's objective takes, with its `step` and `sample`.
      advantage: of each random step and sample, `[P, K, G]`, see `Plan.credit`.
      step_weights: `[K]`, see `Plan.step_weights`.
      states: which of them, of `deal_states`.
    """
    taken = jax.tree.map(lambda x: x[states.prompt, states.state], transitions)
    of_samples = advantage[states.prompt[..., None], taken.step[..., None], taken.sample]
    of_steps = jnp.asarray(step_weights, jnp.float32)[taken.step]
    return Batch(states.prompt, states.weight, of_steps, taken, of_samples)


def score_batch(velocity_fn: VelocityFn, objective: Objective, params: Any, conditioning: Any, batch: Batch) -> Scored:
    """The view that a policy has of `batch [M, B]`: log-densities `[M, B, S]`, and what else the loss needs.

    Args:
      velocity_fn, params: the model.
      objective: of the plan.
      conditioning: pytree with leading axis P.
      batch: see `take_batch`.
    """
    return jax.lax.map(lambda micro: _score(velocity_fn, objective, params, conditioning, micro), batch)


def policy_gradient(
    velocity_fn: VelocityFn, objective: Objective, params: Any, conditioning: Any, batches: Batches
) -> tuple[Any, StepStats]:
    """The gradient of the loss of a worker's states `[M, B]` and its statistics, summed over micro-batches.

    Args:
      velocity_fn, params: the model.
      objective: of the plan.
      conditioning: pytree with leading axis P.
      batches: see `take_batch`. Without those at old parameters the ratio is 1 by construction.

    Returns:
      The gradient, in float32, and statistics.
    """

    def loss(params: Any, micro: Batch) -> tuple[chex.Array, StepStats]:
        scored = _score(velocity_fn, objective, params, conditioning, micro)
        weight = micro.weight[:, None] / micro.advantage.shape[1]
        value, stats = objective.loss(scored, micro, weight)
        deviation = objective.deviation(scored, micro)
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


def _score(velocity_fn: VelocityFn, objective: Objective, params: Any, conditioning: Any, micro: Batch) -> Scored:
    own = jax.tree.map(lambda x: x[micro.prompt], conditioning)
    return objective.score(velocity_fn, params, micro.states, own)


def _scored(score: Scorer, config: LearnerConfig, state: TrainState, batches: Batches) -> Batches:
    """`batches` as the policy that sampled and the copies see them, where the updates ask."""
    of_all = lambda params: lambda batch: jax.lax.map(lambda part: score(params, part), batch)
    views: dict[str, Any] = {}
    if config.samples == "trailing":
        views["old"] = state.trailing
    elif config.epochs * len(batches[0].weight) > 1:
        views["old"] = state.params
    if config.reference_weight:
        views["reference"] = state.reference
    if config.trailing_weight:
        views["trailing"] = state.trailing
    with jax.named_scope("old_log_probabilities"):
        seen = {name: tuple(map(of_all(params), batches)) for name, params in views.items()}
    return tuple(batch._replace(**{name: seen[name][i] for name in seen}) for i, batch in enumerate(batches))


def update_policy(
    score: Scorer,
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    config: LearnerConfig,
    state: TrainState,
    batches: Batches,
    iteration: chex.Array | int = 0,
) -> tuple[TrainState, UpdateStats]:
    """One iteration's optimizer updates: those of `batches` in order, in each of `config.epochs`.

    Before them, one forward pass of each state takes the view of the policy that sampled, unless the only update is at
    its parameters, and one that of each copy that the loss refers to. Compile this without excess precision
    (`parallel.mesh.EXACT`): only then do passes of equal shapes round equally.

    Args:
      score, gradient: of all workers together; a single one has `score_batch` and `policy_gradient`.
      optimizer: see `make_optimizer`.
      state: parameters, optimizer state and average.
      batches: the trained states of all workers, `[U, M, B]`.
      iteration: counted from 0.
    """
    batches = _scored(score, config, state, batches)

    def update(state: TrainState, index: chex.Array) -> tuple[TrainState, UpdateStats]:
        current = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), batches)
        return _optimizer_step(optimizer, gradient, state, current)

    new, stats = jax.lax.scan(update, state, jnp.tile(jnp.arange(len(batches[0].weight)), config.epochs))
    if config.ema_decay is not None:
        new = new._replace(ema=optax.incremental_update(new.params, state.ema, 1 - config.ema_decay))
    if config.trailing_decay is not None:
        decay = jnp.minimum(config.trailing_decay, config.trailing_ramp * (iteration + 1))
        new = new._replace(trailing=optax.incremental_update(new.params, state.trailing, 1 - decay))
    return new, stats


def _optimizer_step(
    optimizer: optax.GradientTransformation, gradient: Gradient, state: TrainState, batches: Batches
) -> tuple[TrainState, UpdateStats]:
    """One update by `batches [M, B]`; not applied where it would leave a nan or infinity."""
    with jax.named_scope("gradient"):
        grads, stats = gradient(state.params, batches)
    norm = optax.tree.norm(grads)
    params, opt_state, sound, update_norm = apply_gradient(
        optimizer, stats.loss.loss, norm, grads, state.opt_state, state.params
    )
    skipped = Skipped(jnp.where(sound, 0, state.skipped.in_a_row + 1), state.skipped.in_all + ~sound)
    state = state._replace(params=params, opt_state=opt_state, skipped=skipped)
    return state, UpdateStats(*stats, norm, update_norm)
