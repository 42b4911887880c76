"""One transition t -> t' of a flow: the ODE's step, and a Gaussian that draws and scores a random one.

The same `Kernel` draws a transition and scores a given one, so that the rollout and the loss cannot drift apart; the
classes of `flow.process` say which Gaussian it is. Everything is float32.
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


def over_latents(scalar: chex.Array, latents: chex.Array) -> chex.Array:
    """`scalar [B]` or `[]` as float32, with axes appended until it broadcasts over `latents [B, ...]`."""
    scalar = jnp.asarray(scalar, jnp.float32)
    return scalar.reshape(scalar.shape + (1,) * (latents.ndim - scalar.ndim))


def euler_step(latents: chex.Array, velocity: chex.Array, time: chex.Array, next_time: chex.Array) -> chex.Array:
    """The deterministic step x - dt v of `latents [B, ...]`, for `time` and `next_time` of shape `[B]` or `[]`."""
    return latents - (over_latents(time, latents) - over_latents(next_time, latents)) * velocity


def draw(kernel: Kernel, noise: chex.Array) -> chex.Array:
    """A sample of `kernel`, given standard normal `noise` that broadcasts against the mean."""
    return kernel.mean + kernel.std * noise


def kl_divergence(kernel: Kernel, other: Kernel, num_axes: int = 2) -> chex.Array:
    """KL(kernel | other) of two Gaussians of one std, (mean - other mean)^2 / (2 std^2).

    Averaged over the last `num_axes` axes, as `log_prob` is.
    """
    standardised = (kernel.mean - other.mean) / kernel.std
    return 0.5 * jnp.square(standardised).mean(axis=tuple(range(-num_axes, 0)))


def log_prob(kernel: Kernel, sample: chex.Array, num_axes: int = 2) -> chex.Array:
    """Gaussian log-density of `sample`, averaged over its last `num_axes` axes (the latent dimensions).

    The average, not the sum, is what every GRPO for flow models clips (range 1e-4 goes with it). The std must be
    positive: a deterministic step has no density.
    """
    standardised = (sample - kernel.mean) / kernel.std
    density = -0.5 * jnp.square(standardised) - jnp.log(kernel.std) - 0.5 * np.log(2 * np.pi)
    return density.mean(axis=tuple(range(-num_axes, 0)))
