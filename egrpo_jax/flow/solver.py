"""Solving the flow's ODE over a time grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.flow.transition import euler_step

VelocityFn = Callable[[Any, chex.Array, chex.Array, Any], chex.Array]
"""`(params, latents[B, N, D], time[B], conditioning) -> velocity[B, N, D]`, the one thing known about a model."""


def solve_path(
    velocity_fn: VelocityFn, params: Any, latents: chex.Array, times: chex.Array, conditioning: Any
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Euler steps over all of `times`, keeping the path.

    Args:
      velocity_fn, params, conditioning: the model; `conditioning` has leading axis B.
      latents: `[B, N, D]` at `times[0]`.
      times: `[T + 1]`, decreasing.

    Returns:
      The final latents `[B, N, D]`, and, at the start of each step, latents and velocities `[T, B, N, D]`.
    """

    def step(x: chex.Array, span: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
        time, next_time = span
        velocity = velocity_fn(params, x, jnp.broadcast_to(time, x.shape[:1]), conditioning)
        return euler_step(x, velocity, time, next_time), (x, velocity)

    final, (path, velocities) = jax.lax.scan(step, latents, (times[:-1], times[1:]))
    return final, path, velocities


def solve(
    velocity_fn: VelocityFn, params: Any, latents: chex.Array, times: chex.Array, conditioning: Any
) -> chex.Array:
    """Euler steps over all of `times`, of which nothing is kept.

    Args:
      velocity_fn, params, conditioning: the model; `conditioning` has leading axis B.
      latents: `[B, N, D]` at `times[0]`.
      times: `[T + 1]`, decreasing.

    Returns:
      Latents `[B, N, D]` at `times[-1]`.
    """

    def step(x: chex.Array, span: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, None]:
        time, next_time = span
        velocity = velocity_fn(params, x, jnp.broadcast_to(time, x.shape[:1]), conditioning)
        return euler_step(x, velocity, time, next_time), None

    return jax.lax.scan(step, latents, (times[:-1], times[1:]))[0]


def tail_steps(num_steps: int, start: Any, stride: Any) -> Any:
    """The number of steps from `start` to the end of a grid of `num_steps`: ceil((T - start) / stride)."""
    return (num_steps - start + stride - 1) // stride
