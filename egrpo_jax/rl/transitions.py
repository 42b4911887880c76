"""Random steps: what a rollout keeps of them for the loss, and the noise that they are drawn with."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.flow.process import Process
from egrpo_jax.flow.transition import Kernel

_INITIAL = 0  # What the key of initial noise is folded with; grid step i uses i + 1.


class Transitions(NamedTuple):
    """Random steps to train on: of each of P rollouts M states, and S samples drawn from each.

    Attributes:
      latents: x_t, `[P, M, N, D]`.
      next_latents: x_t', `[P, M, S, N, D]`.
      time, next_time, noise: `[P, M]`.
      log_prob: log p(x_t' | x_t) as the rollout computed it, averaged over N and D, `[P, M, S]`.
      step: which of the plan's K random steps it is, `[P, M]`.
      sample: a sample whose way to its image it is on, of G, `[P, M, S]`.
    """

    latents: chex.Array
    next_latents: chex.Array
    time: chex.Array
    next_time: chex.Array
    noise: chex.Array
    log_prob: chex.Array
    step: chex.Array
    sample: chex.Array


def split_samples(transitions: Transitions, parts: int) -> Transitions:
    """Each state once for every part of its samples, one part after another: `[P, M parts, S / parts]`."""

    def split(x: chex.Array) -> chex.Array:
        rows, states, samples, *shape = x.shape
        return x.reshape(rows, states * parts, samples // parts, *shape)

    repeated = jax.tree.map(lambda x: jnp.repeat(x, parts, axis=1), transitions)
    own = {name: split(getattr(transitions, name)) for name in ("next_latents", "log_prob", "sample")}
    return repeated._replace(**own)


class Anchors(NamedTuple):
    """The states of P anchors at their E active steps, and the velocities there, each `[P, E, N, D]`."""

    latents: chex.Array
    velocity: chex.Array


class Rollout(NamedTuple):
    """The samples of one iteration.

    Attributes:
      transitions: the random steps, those of one shape together, `Transitions` each; or what else a plan learns from.
      latents: where the tails end, t = 0: `[M, N, D]`, in the order of the plan's `Deal`.
    """

    transitions: tuple[Any, ...]
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
    """One key for each rollout of an iteration, from its place in the batch, never from a device: `[count]`."""
    return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(first, first + count))


def initial_noise(keys: chex.Array, shape: tuple[int, int]) -> chex.Array:
    """The noise that each rollout begins with, `[P, *shape]`."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, _INITIAL), shape))(keys)


def step_noise(keys: chex.Array, steps: chex.Array, samples: chex.Array, shape: tuple[int, int]) -> chex.Array:
    """Noise of random steps, keyed by rollout, grid step and sample.

    Args:
      keys: `[P]`.
      steps: grid steps, `[K]`.
      samples: their numbers, `[S]`.
      shape: (N, D).

    Returns:
      `[P, K, S, *shape]`.
    """

    def one(key: chex.Array, step: chex.Array, sample: chex.Array) -> chex.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, 1 + step), sample), shape)

    over_samples = jax.vmap(one, (None, None, 0))
    over_steps = jax.vmap(over_samples, (None, 0, None))
    return jax.vmap(over_steps, (0, None, None))(keys, steps, samples)
