"""The compiled phases of an iteration, spread over the mesh: all without a parameter in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

from egrpo_jax.common.trees import combine, partition
from egrpo_jax.parallel.fsdp import Layout
from egrpo_jax.parallel.mesh import REPLICATED, compiled, over_samples, sample_devices, spread
from egrpo_jax.rl.deal import Tails, deal_prompts, deal_states, deal_tails, first_rows
from egrpo_jax.rl.rollout import Rollout, Transitions, roll_out
from egrpo_jax.rl.update import (
    Batch,
    Scored,
    StepStats,
    TrainState,
    UpdateStats,
    add_stats,
    policy_gradient,
    score_batch,
    take_batches,
    update_policy,
)
from egrpo_jax.training.job import Job
from egrpo_jax.training.state import abstract_state


class Phases(NamedTuple):
    """The phases of an iteration, compiled at their first call.

    Attributes:
      tails: how the tails of a rollout are dealt to the devices.
      rollout: `(params, conditioning, keys [P])` to a `Rollout`, whose latents are in the order of `tails`.
      decode: `(params, latents [M, N, D])` to images `[M, H, W, 3]`.
      update: `(state, frozen, transitions, advantage, conditioning)` to the new state and statistics.
    """

    tails: Tails
    rollout: Callable[[Any, Any, chex.Array], Rollout]
    decode: Callable[[Any, chex.Array], chex.Array]
    update: Callable[..., tuple[TrainState, UpdateStats]]


def make_phases(job: Job) -> Phases:
    """The phases for the mesh that is set: samples spread over it, parameters as they lie."""
    mesh = jax.sharding.get_mesh()
    layout = Layout.of(job.pipeline.abstract(mesh), job.pipeline.dtype)
    decode = lambda params, latents: job.pipeline.decode(layout.boxed(params), latents)
    kept = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(job, mesh))
    num_prompts = job.config.prompts_per_rollout or job.config.prompts_per_iteration
    tails = deal_tails(job.plan, num_prompts, sample_devices(), job.config.tails_per_device)
    return Phases(
        tails=tails,
        rollout=compiled(functools.partial(_rollout, job, layout, tails)),
        decode=compiled(spread(decode, (layout.specs, over_samples()), over_samples())),
        update=compiled(functools.partial(_update, job, layout), donate_argnums=(0,), out_shardings=(kept, None)),
    )


def _rollout(job: Job, layout: Layout, tails: Tails, params: Any, conditioning: Any, keys: chex.Array) -> Rollout:
    def roll(params: Any, tails: Tails, conditioning: Any, keys: chex.Array) -> Rollout:
        velocity = lambda params, *inputs: job.pipeline.velocity(layout.boxed(params), *inputs)
        return roll_out(velocity, params, job.plan, tails, conditioning, keys, job.pipeline.latents_shape)

    num_prompts, workers = len(keys), sample_devices()
    rows = deal_prompts(num_prompts, workers).ravel()
    tables = Tails._make(over_samples(axis) for axis in (0, 1, 1, 1, 1, 0))
    in_specs = (layout.specs, tables, over_samples(), over_samples())
    rollout = spread(roll, in_specs, over_samples())(
        layout.working_copy(params), tails, *_take((conditioning, keys), rows)
    )
    return rollout._replace(transitions=_take(rollout.transitions, first_rows(num_prompts, workers)))


def _update(
    job: Job,
    layout: Layout,
    state: TrainState,
    frozen: Any,
    transitions: Transitions,
    advantage: chex.Array,
    conditioning: Any,
) -> tuple[TrainState, UpdateStats]:
    config, pipeline = job.config.learner, job.pipeline
    trained_layout, frozen_layout = (Layout(specs) for specs in partition(layout.specs, pipeline.trainable))
    velocity = lambda frozen: (
        lambda trained, *inputs: pipeline.velocity(layout.boxed(combine(trained, frozen)), *inputs)
    )

    def score(trained: Any, frozen: Any, conditioning: Any, batch: Batch) -> Scored:
        return score_batch(velocity(frozen), job.plan.process, config, trained, conditioning, batch)

    def gradient(trained: Any, frozen: Any, conditioning: Any, batch: Batch) -> tuple[Any, StepStats]:
        grads, stats = policy_gradient(velocity(frozen), job.plan.process, config, trained, conditioning, batch)
        return trained_layout.sum_gradients(grads), jax.tree.map(lambda x: x[None], stats)

    rows = deal_prompts(len(advantage), sample_devices()).ravel()
    transitions, advantage, conditioning = _take((transitions, advantage, conditioning), rows)
    samples, in_specs = over_samples(), (trained_layout.specs, frozen_layout.specs, over_samples(), over_samples())
    score_all = spread(score, in_specs, samples)
    gradient_of_each = spread(gradient, in_specs, (trained_layout.specs, samples))

    def gradient_of_all(trained: Any, batch: Batch) -> tuple[Any, StepStats]:
        grads, stats = gradient_of_each(trained, frozen, conditioning, batch)
        return grads, add_stats(stats)

    return update_policy(
        lambda trained, batch: score_all(trained, frozen, conditioning, batch),
        gradient_of_all,
        job.optimizer,
        config,
        state,
        _batches(job, transitions, advantage),
    )


def _batches(job: Job, transitions: Transitions, advantage: chex.Array) -> Batch:
    """The trained states of all workers, `[U, D M, B]`, of rows of prompts dealt to them."""
    config = job.config.learner
    num_prompts, num_active = job.config.prompts_per_iteration, advantage.shape[1]
    updates = config.updates_of_epoch(num_active)
    states = deal_states(num_prompts, num_active, sample_devices(), updates, config.micro_batch)
    in_specs = (over_samples(), over_samples(), REPLICATED, over_samples(1))
    step_weights = job.plan.step_weights(config.step_weights)
    return spread(take_batches, in_specs, over_samples(1))(transitions, advantage, step_weights, states)


def _take(tree: Any, rows: np.ndarray) -> Any:
    """The rows of every leaf; `tree` itself, and nothing moves between devices, where these are all."""
    count = len(jax.tree.leaves(tree)[0])
    return tree if np.array_equal(rows, np.arange(count)) else jax.tree.map(lambda x: x[rows], tree)
