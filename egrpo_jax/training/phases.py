"""The compiled phases of an iteration, spread over the mesh: all without a parameter in memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.trees import combine, partition
from egrpo_jax.parallel.fsdp import Layout
from egrpo_jax.parallel.mesh import REPLICATED, compiled, over_samples, sample_devices, spread
from egrpo_jax.rl.advantage import Credit, complete_groups, credit, running_advantage
from egrpo_jax.rl.deal import Candidates, deal_candidates, deal_prompts, deal_states, first_rows
from egrpo_jax.rl.objective import Batch, Scored
from egrpo_jax.rl.plan import AnchorPlan, Block, Deal
from egrpo_jax.rl.rollout import walk_anchors
from egrpo_jax.rl.transitions import Anchors, Rollout, Transitions, split_samples
from egrpo_jax.rl.update import (
    Batches,
    Gradient,
    Scorer,
    StepStats,
    TrainState,
    UpdateStats,
    add_stats,
    policy_gradient,
    score_batch,
    take_batch,
    update_policy,
)
from egrpo_jax.training.job import Job
from egrpo_jax.training.scoring import DIVERSITY
from egrpo_jax.training.state import Running, abstract_state


class Phases(NamedTuple):
    """The phases of an iteration, compiled at their first call.

    Attributes:
      deal: how the work of a call of `rollout` is dealt to the devices.
      screen: `(params, conditioning, keys [C P])` to the `Anchors` of all candidates, and where these end, in the order
        of `candidates`.
      candidates: how their ends are dealt; both are None where there are none.
      take: `(tree, rows)` to so many rows of every leaf.
      rollout: `(params, schedule, conditioning, keys [P])` to a `Rollout`, whose latents are in the order of `deal`.
      decode: `(params, latents [M, N, D])` to images `[M, H, W, 3]`.
      credit: `(rewards [P, E, R, G] by name, which of them came, running)` to advantages `[P, K, G]`.
      update: `(state, frozen, transitions, advantage, step_weights, iteration, conditioning)` to the new state and
        statistics.
    """

    deal: Deal
    screen: Callable[..., tuple[Anchors, chex.Array]] | None
    candidates: Candidates | None
    take: Callable[[Any, np.ndarray], Any]
    rollout: Callable[[Any, Any, Any, chex.Array], Rollout]
    decode: Callable[[Any, chex.Array], chex.Array]
    credit: Callable[[dict[str, chex.Array], chex.Array, Running | None], chex.Array]
    update: Callable[..., tuple[TrainState, UpdateStats]]


def make_phases(job: Job) -> Phases:
    """The phases for the mesh that is set: samples spread over it, parameters as they lie.

    They serve all iterations, whose plans have one shape.

    Raises:
      ConfigError: the work of the plan cannot be dealt to so many devices.
    """
    mesh = jax.sharding.get_mesh()
    layout = Layout.of(job.pipeline.abstract(mesh), job.pipeline.dtype)
    decode = lambda params, latents: job.pipeline.decode(layout.boxed(params), latents)
    kept = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(job, mesh))
    deal = job.plan.deal(job.rollouts_at_once, sample_devices(), job.config.tails_per_device)
    screens = job.plan.candidates > 1
    return Phases(
        deal=deal,
        screen=compiled(functools.partial(_screen, job, layout)) if screens else None,
        candidates=deal_candidates(job.rollouts * job.plan.candidates, sample_devices()) if screens else None,
        take=jax.jit(lambda tree, rows: jax.tree.map(lambda x: x[rows], tree)),
        rollout=compiled(functools.partial(_rollout, job, layout, deal)),
        decode=compiled(spread(decode, (layout.specs, over_samples()), over_samples())),
        credit=jax.jit(functools.partial(_credit, job)),
        update=compiled(functools.partial(_update, job, layout), donate_argnums=(0,), out_shardings=(kept, None)),
    )


def _rollout(
    job: Job, layout: Layout, deal: Deal, params: Any, schedule: Any, conditioning: Any, keys: chex.Array
) -> Rollout:
    def roll(params: Any, deal: Any, schedule: Any, conditioning: Any, keys: chex.Array) -> Rollout:
        velocity = lambda params, *inputs: job.pipeline.velocity(layout.boxed(params), *inputs)
        return job.plan.roll_out(velocity, params, deal, schedule, conditioning, keys, job.pipeline.latents_shape)

    count, workers = len(keys), sample_devices()
    rows = deal_prompts(count, workers).ravel()
    tables = jax.tree.map(over_samples, deal.worker_axes())
    in_specs = (layout.specs, tables, REPLICATED, over_samples(), over_samples())
    rollout = spread(roll, in_specs, over_samples())(
        layout.working_copy(params), deal, schedule, *take_rows((conditioning, keys), rows)
    )
    return rollout._replace(transitions=job.plan.gather(rollout.transitions, count, workers))


def _screen(job: Job, layout: Layout, params: Any, conditioning: Any, keys: chex.Array) -> tuple[Anchors, chex.Array]:
    assert isinstance(job.plan, AnchorPlan)  # which alone has candidates
    plan = job.plan

    def walk(params: Any, conditioning: Any, keys: chex.Array) -> tuple[Anchors, chex.Array]:
        velocity = lambda params, *inputs: job.pipeline.velocity(layout.boxed(params), *inputs)
        return walk_anchors(velocity, params, plan, conditioning, keys, job.pipeline.latents_shape)

    count, workers = len(keys), sample_devices()
    rows = deal_prompts(count, workers).ravel()
    anchors, ends = spread(walk, (layout.specs, over_samples(), over_samples()), over_samples())(
        layout.working_copy(params), *take_rows((conditioning, keys), rows)
    )
    return take_rows(anchors, first_rows(count, workers)), ends


def _credit(job: Job, values: dict[str, chex.Array], came: chex.Array, running: Running | None = None) -> chex.Array:
    """The advantages, as plan and section `rewards` have it; nan if no group has all of its scores.

    With a running mean they are clipped, and have a part that compares with it.
    """
    config = job.config.rewards
    weights = dict(zip(config.train, config.weights, strict=True))
    weights |= {DIVERSITY: config.diversity} if config.diversity else {}
    clips = dict(zip(config.train, config.clips, strict=True)) if config.clips else {}
    how = Credit(**{choice.name: getattr(config, choice.name) for choice in dataclasses.fields(Credit)})
    normalise = lambda values, came: credit(values, came, weights, clips, how)
    advantage = job.plan.credit(normalise, values, came)
    if running is not None:
        total = jnp.asarray(sum(weight * values[name] for name, weight in weights.items()))
        clip = job.config.learner.advantage_clip
        compared = running_advantage(total, came, running.mean, jnp.sqrt(running.variance)).sum(2)
        advantage = jnp.where(complete_groups(came)[..., None], advantage.clip(-clip, clip) + compared, 0.0)
    return jnp.where(complete_groups(came).any(), advantage, jnp.nan)


def _update(
    job: Job,
    layout: Layout,
    state: TrainState,
    frozen: Any,
    transitions: tuple[Transitions, ...],
    advantage: chex.Array,
    step_weights: chex.Array,
    iteration: chex.Array,
    conditioning: Any,
) -> tuple[TrainState, UpdateStats]:
    lesson = prepare(job, layout, frozen, transitions, advantage, step_weights, conditioning)
    return update_policy(
        lesson.score, lesson.gradient, job.optimizer, job.config.learner, state, lesson.batches, iteration
    )


class Lesson(NamedTuple):
    """The arguments of `update_policy` for all devices together."""

    score: Scorer
    gradient: Gradient
    batches: Batches


def prepare(
    job: Job,
    layout: Layout,
    frozen: Any,
    transitions: tuple[Transitions, ...],
    advantage: chex.Array,
    step_weights: chex.Array,
    conditioning: Any,
) -> Lesson:
    """Deals what `Phases.update` is called with to the devices."""
    objective = job.plan.objective(job.config.learner)
    trained_layout, frozen_layout = (Layout(specs) for specs in partition(layout.specs, job.pipeline.trainable))
    velocity = lambda frozen: (
        lambda trained, *inputs: job.pipeline.velocity(layout.boxed(combine(trained, frozen)), *inputs)
    )

    def score(trained: Any, frozen: Any, conditioning: Any, batch: Batch) -> Scored:
        return score_batch(velocity(frozen), objective, trained, conditioning, batch)

    def gradient(trained: Any, frozen: Any, conditioning: Any, batches: Batches) -> tuple[Any, StepStats]:
        grads, stats = policy_gradient(velocity(frozen), objective, trained, conditioning, batches)
        return trained_layout.sum_gradients(grads), jax.tree.map(lambda x: x[None], stats)

    transitions = job.plan.prune(transitions, advantage)
    rows = deal_prompts(len(advantage), sample_devices()).ravel()
    transitions, advantage, conditioning = take_rows((transitions, advantage, conditioning), rows)
    samples, in_specs = over_samples(), (trained_layout.specs, frozen_layout.specs, over_samples(), over_samples())
    score_all = spread(score, in_specs, samples)
    gradient_of_each = spread(gradient, in_specs, (trained_layout.specs, samples))

    def gradient_of_all(trained: Any, batches: Batches) -> tuple[Any, StepStats]:
        grads, stats = gradient_of_each(trained, frozen, conditioning, batches)
        return grads, add_stats(stats)

    sizes = zip(job.plan.blocks, transitions, job.plan.shares, strict=True)
    return Lesson(
        lambda trained, batch: score_all(trained, frozen, conditioning, batch),
        gradient_of_all,
        tuple(_batch(job, size, block, share, advantage, step_weights) for size, block, share in sizes),
    )


def _batch(job: Job, size: Block, block: Any, share: float, advantage: chex.Array, step_weights: chex.Array) -> Batch:
    """The trained states of all workers, `[U, D M, B]`, of one block of transitions, in rows dealt to them."""
    config = job.config.learner
    if size.divides(config.minibatches):
        block = split_samples(block, config.minibatches)
    num_states = block.step.shape[1]
    updates = config.updates_of_epoch(num_states)
    states = deal_states(job.rollouts, num_states, sample_devices(), updates, config.micro_batch, share)
    in_specs = (over_samples(), over_samples(), REPLICATED, over_samples(1))
    return spread(take_batch, in_specs, over_samples(1))(block, advantage, step_weights, states)


def take_rows(tree: Any, rows: np.ndarray) -> Any:
    """The rows of every leaf; `tree` itself, and nothing moves between devices, where these are all."""
    count = len(jax.tree.leaves(tree)[0])
    return tree if np.array_equal(rows, np.arange(count)) else jax.tree.map(lambda x: x[rows], tree)
