r"""One transition t -> t' of a flow, deterministic or random.

With dt = t - t' > 0, velocity v = noise - data and diffusion coefficient sigma, the SDE of Flow-GRPO
(arXiv:2505.05470, eq. 12), which E-GRPO uses, is discretised as

    mean = x - dt [ v + sigma^2 / (2 t) (x + (1 - t) v) ],      std = sigma sqrt(dt),      x' = mean + std e.

sigma = 0 gives the Euler step of the ODE. The same `kernel` draws a transition and scores a given one, so that the
rollout and the loss cannot drift apart. Everything is float32.
"""

from __future__ import annotations

from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np


class Kernel(NamedTuple):
    """A Gaussian N(mean, std^2 I) over the next latents; `std` broadcasts against `mean`."""

    mean: chex.Array
    std: chex.Array


def _over(scalar: chex.Array, latents: chex.Array) -> chex.Array:
    """Appends axes to `scalar [B]` until it broadcasts over `latents [B, ...]`."""
    scalar = jnp.asarray(scalar, jnp.float32)
    return scalar.reshape(scalar.shape + (1,) * (latents.ndim - scalar.ndim))


def euler_step(latents: chex.Array, velocity: chex.Array, time: chex.Array, next_time: chex.Array) -> chex.Array:
    """The deterministic step x - dt v of `latents [B, ...]`, for `time` and `next_time` of shape `[B]` or `[]`."""
    return latents - (_over(time, latents) - _over(next_time, latents)) * velocity


def sde_kernel(
    latents: chex.Array, velocity: chex.Array, time: chex.Array, next_time: chex.Array, sigma: chex.Array
) -> Kernel:
    """The distribution of the next latents of a random step.

    Args:
      latents: x_t, `[B, ...]`, float32.
      velocity: v(x_t, t), like `latents`.
      time, next_time: t > t' >= 0, `[B]` or `[]`.
      sigma: diffusion coefficient at t, `[B]` or `[]`; see `flow.entropy.sigma`.

    Returns:
      mean `[B, ...]` and std `[B, 1, ...]`.
    """
    chex.assert_equal_shape([latents, velocity])
    chex.assert_type([latents, velocity], jnp.float32)
    time, next_time, sigma = (_over(value, latents) for value in (time, next_time, sigma))
    span = time - next_time
    drift = velocity + jnp.square(sigma) / (2 * time) * (latents + (1 - time) * velocity)
    return Kernel(latents - span * drift, sigma * jnp.sqrt(span))


def draw(kernel: Kernel, noise: chex.Array) -> chex.Array:
    """A sample of `kernel`, given standard normal `noise` that broadcasts against the mean."""
    return kernel.mean + kernel.std * noise


def log_prob(kernel: Kernel, sample: chex.Array, num_axes: int = 2) -> chex.Array:
    """Gaussian log-density of `sample`, averaged over its last `num_axes` axes (the latent dimensions).

    The average, not the sum, is what every GRPO for flow models clips (range 1e-4 goes with it). The std must be
    positive: a deterministic step has no density.
    """
    standardised = (sample - kernel.mean) / kernel.std
    density = -0.5 * jnp.square(standardised) - jnp.log(kernel.std) - 0.5 * np.log(2 * np.pi)
    return density.mean(axis=tuple(range(-num_axes, 0)))
