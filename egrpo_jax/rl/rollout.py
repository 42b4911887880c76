"""The rollout of an anchor plan: anchor, branches, tails."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.flow.solver import VelocityFn, solve_path
from egrpo_jax.flow.transition import draw, log_prob
from egrpo_jax.rl.deal import Tails
from egrpo_jax.rl.transitions import Anchors, Rollout, Transitions, group_kernel, initial_noise

if TYPE_CHECKING:  # a plan rolls itself out
    from egrpo_jax.rl.plan import AnchorPlan


@jax.named_scope("anchors")
def walk_anchors(
    velocity_fn: VelocityFn,
    params: Any,
    plan: AnchorPlan,
    conditioning: Any,
    keys: chex.Array,
    shape: tuple[int, int],
) -> tuple[Anchors, chex.Array]:
    """The anchors of P prompts, and where they end, `[P, N, D]`; for the arguments see `roll_out`."""
    times = jnp.array(plan.times, jnp.float32)
    steps = jnp.array([branch.step for branch in plan.branches])
    end, *path = solve_path(velocity_fn, params, initial_noise(keys, shape), times, conditioning)
    return Anchors(*(jnp.moveaxis(x[steps], 0, 1) for x in path)), end


def roll_out(
    velocity_fn: VelocityFn,
    params: Any,
    plan: AnchorPlan,
    tails: Tails,
    conditioning: Any,
    keys: chex.Array,
    shape: tuple[int, int],
    anchors: Anchors | None = None,
    noises: chex.Array | None = None,
) -> Rollout:
    """Samples one iteration of `plan`, or a worker's part of it.

    The anchor's own velocities serve all branches, so that only anchor and tails call the model:
    `plan.rollout_passes` times for each prompt.

    Args:
      velocity_fn, params: the model.
      tails: the worker's own, of `deal_tails`; all of them are for one worker.
      conditioning: pytree with leading axis P.
      keys: one key for each prompt, `[P]`.
      shape: (N, D) of the latents.
      anchors: if they have been walked already.
      noises: of the random steps, `[E]`, where they are not those of `plan`.
    """
    if anchors is None:
        anchors, _ = walk_anchors(velocity_fn, params, plan, conditioning, keys, shape)
    if noises is None:
        noises = jnp.array([branch.noise for branch in plan.branches], jnp.float32)
    transitions = _branch(plan, anchors, keys, noises)
    return Rollout((transitions,), walk_tails(velocity_fn, params, plan, tails, transitions.next_latents, conditioning))


@jax.named_scope("branches")
def _branch(plan: AnchorPlan, anchors: Anchors, keys: chex.Array, noises: chex.Array) -> Transitions:
    times, (latents, velocity) = jnp.array(plan.times, jnp.float32), anchors
    steps = jnp.array([branch.step for branch in plan.branches])
    stops = jnp.array([branch.stop for branch in plan.branches])
    time, next_time, noise = (
        jnp.broadcast_to(value, latents.shape[:2]) for value in (times[steps], times[stops], noises)
    )
    kernel = group_kernel(plan.process, latents, velocity, time, next_time, noise)
    next_latents = draw(kernel, plan.noise(keys, steps, latents.shape[-2:]))
    density = log_prob(kernel, next_latents)
    step = jnp.broadcast_to(jnp.arange(len(steps)), latents.shape[:2])
    sample = jnp.broadcast_to(jnp.arange(plan.group_size), density.shape)
    return Transitions(latents, next_latents, time, next_time, noise, density, step, sample)


@jax.named_scope("tails")
def walk_tails(
    velocity_fn: VelocityFn, params: Any, plan: AnchorPlan, tails: Tails, starts: chex.Array, conditioning: Any
) -> chex.Array:
    """Walks `tails` from the samples `[P, E, G, N, D]` to t = 0: `[M, N, D]`."""
    _, num_branches, group_size, *shape = starts.shape
    prompts, solver = tails.start // (num_branches * group_size), plan.tail_stepper

    def advance(carry: tuple[chex.Array, Any], step: tuple[chex.Array, ...]) -> tuple[tuple[chex.Array, Any], None]:
        latents, history = carry
        carried, time, next_time, weight = step
        here = latents[carried]
        own = jax.tree.map(lambda x: x[jnp.take(prompts, carried, mode="clip")], conditioning)
        velocity = velocity_fn(params, here, time, own)
        there, history = solver.step(here, velocity, time, next_time, weight, history)
        return (latents.at[carried].set(there), history), None

    latents = starts.reshape(-1, *shape)[tails.start]
    spare = jnp.zeros_like(latents[:1])  # what a slot without a tail carries
    steps = (tails.carried, tails.time, tails.next_time, tails.weight)
    history = solver.history(jnp.zeros((tails.carried.shape[1], *shape), latents.dtype))  # of each slot
    (latents, _), _ = jax.lax.scan(advance, (jnp.concatenate([latents, spare]), history), steps)
    return latents[:-1]
