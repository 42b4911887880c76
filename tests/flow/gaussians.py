"""Flows whose velocity is known: of data that are a mixture of Gaussians of one width."""

import jax
import jax.numpy as jnp
import numpy as np


def mixture_velocity(means, deviation):
    """The velocity E[noise - data | x] of data N(m, deviation^2), m being any of `means`, each number by itself."""

    def velocity(params, latents, time, conditioning):
        del params, conditioning
        t = time.reshape(time.shape + (1,) * latents.ndim)  # [B, 1, 1, 1] against [B, N, D, mode]
        means_ = jnp.asarray(means, jnp.float32)
        off = latents[..., None] - (1 - t) * means_
        variance = (1 - t) ** 2 * deviation**2 + t**2
        posterior = jax.nn.softmax(-(off**2) / (2 * variance), axis=-1)
        data = means_ + (1 - t) * deviation**2 / variance * off
        return (posterior * (t / variance * off - data)).sum(-1)

    return velocity


def variance_at(time, deviation):
    """The variance of the marginal of N(m, deviation^2) at `time`."""
    return (1 - time) ** 2 * deviation**2 + time**2


def factor_and_std(process, times, spans):
    """For data N(0, 1) the mean of a step is a factor times x: factors and stds of `spans`, pairs (step, span)."""
    rows = [(times[i], times[i + span], process.noise(times, i, span)) for i, span in spans]
    time, next_time, noise = jnp.asarray(np.array(rows).T, jnp.float32)
    latents = jnp.ones((len(rows), 1, 1))
    velocity = mixture_velocity([0.0], 1.0)(None, latents, time, None)
    kernel = process.kernel(latents, velocity, time, next_time, noise)
    return np.asarray(kernel.mean, np.float64).ravel(), np.asarray(kernel.std, np.float64).ravel()
