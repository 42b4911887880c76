"""The rollout of a plan: anchor, branches, tails."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.flow.process import Process
from egrpo_jax.flow.solver import VelocityFn, solve_path
from egrpo_jax.flow.transition import Kernel, draw, log_prob
from egrpo_jax.rl.deal import Tails
from egrpo_jax.rl.plan import Plan

_ANCHOR = 0  # What the anchor's noise key is folded with; grid step i uses i + 1.


class Transitions(NamedTuple):
    """Random steps to train on: of each of P prompts E active steps, and G samples from the state of each.

    Attributes:
      latents: x_t, `[P, E, N, D]`.
      next_latents: x_t', `[P, E, G, N, D]`.
      time, next_time, noise: `[P, E]`.
      log_prob: log p(x_t' | x_t) as the rollout computed it, averaged over N and D, `[P, E, G]`.
    """

    latents: chex.Array
    next_latents: chex.Array
    time: chex.Array
    next_time: chex.Array
    noise: chex.Array
    log_prob: chex.Array


class Rollout(NamedTuple):
    """The samples of one iteration.

    Attributes:
      transitions: the random steps.
      latents: where the tails end, t = 0: `[M, N, D]`, in the order of `Tails`.
    """

    transitions: Transitions
    latents: chex.Array


def group_kernel(
    process: Process,
    latents: chex.Array,
    velocity: chex.Array,
    time: chex.Array,
    next_time: chex.Array,
    noise: chex.Array,
) -> Kernel:
    """The kernel of states `[..., N, D]`, with an axis for the samples of each state: mean `[..., 1, N, D]`.

    Rollout and loss both call this: all samples of a state share one velocity.
    """
    kernel = process.kernel(latents, velocity, time, next_time, noise)
    return Kernel(kernel.mean[..., None, :, :], kernel.std[..., None, :, :])


def prompt_keys(key: chex.PRNGKey, first: int, count: int) -> chex.Array:
    """One key for each prompt of an iteration, from its place in the batch, never from a device: `[count]`."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(first, first + count))


def anchor_noise(keys: chex.Array, shape: tuple[int, int]) -> chex.Array:
    """The initial noise of each prompt, `[P, *shape]`."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, _ANCHOR), shape))(keys)


def _branch_noise(keys: chex.Array, plan: Plan, shape: tuple[int, int]) -> chex.Array:
    """Noise `[P, E, G, *shape]`, keyed by prompt, grid step and sample."""

    def one(key: chex.Array, step: chex.Array, sample: chex.Array) -> chex.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 1 + step), sample), shape)

    over_samples = jax.vmap(one, (None, None, 0))
    over_steps = jax.vmap(over_samples, (None, 0, None))
    steps = jnp.array([branch.step for branch in plan.branches])
    return jax.vmap(over_steps, (0, None, None))(keys, steps, jnp.arange(plan.group_size))


def roll_out(
    velocity_fn: VelocityFn,
    params: Any,
    plan: Plan,
    tails: Tails,
    conditioning: Any,
    keys: chex.Array,
    shape: tuple[int, int],
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
    """
    times = jnp.array(plan.times, jnp.float32)
    with jax.named_scope("anchors"):
        _, path, velocities = solve_path(velocity_fn, params, anchor_noise(keys, shape), times, conditioning)
    transitions = _branch(plan, times, path, velocities, keys)
    return Rollout(transitions, _walk(velocity_fn, params, plan, tails, transitions.next_latents, conditioning))


@jax.named_scope("branches")
def _branch(plan: Plan, times: chex.Array, path: chex.Array, velocities: chex.Array, keys: chex.Array) -> Transitions:
    steps = jnp.array([branch.step for branch in plan.branches])
    stops = jnp.array([branch.stop for branch in plan.branches])
    noises = jnp.array([branch.noise for branch in plan.branches], jnp.float32)
    latents, velocity = (jnp.moveaxis(x[steps], 0, 1) for x in (path, velocities))
    time, next_time, noise = (
        jnp.broadcast_to(value, latents.shape[:2]) for value in (times[steps], times[stops], noises)
    )
    kernel = group_kernel(plan.process, latents, velocity, time, next_time, noise)
    next_latents = draw(kernel, _branch_noise(keys, plan, path.shape[-2:]))
    return Transitions(latents, next_latents, time, next_time, noise, log_prob(kernel, next_latents))


@jax.named_scope("tails")
def _walk(
    velocity_fn: VelocityFn, params: Any, plan: Plan, tails: Tails, starts: chex.Array, conditioning: Any
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
