"""Classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598) around any velocity."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.flow.solver import VelocityFn

NEGATIVE = "negative"
"""The parameters' entry for the conditioning of the prompt that is guided away from: a dict of its fields, one each."""


def guided(velocity: VelocityFn, scale: float) -> VelocityFn:
    """`v(negative) + scale * (v(prompt) - v(negative))`, both from one pass of `velocity` over twice as many samples.

    Args:
      velocity: its conditioning is a NamedTuple of arrays with leading axis B.
      scale: 1 is `velocity` itself, which is cheaper.

    Returns:
      A velocity that reads `params[NEGATIVE]`. It is differentiated through both terms.
    """

    def guided_velocity(params: Any, latents: chex.Array, time: chex.Array, conditioning: Any) -> chex.Array:
        one = type(conditioning)(**params[NEGATIVE])
        negative = jax.tree.map(
            lambda leaf, like: jnp.broadcast_to(leaf, like.shape).astype(like.dtype), one, conditioning
        )
        twice = lambda a, b: jnp.concatenate([a, b])
        both = velocity(params, twice(latents, latents), twice(time, time), jax.tree.map(twice, conditioning, negative))
        towards, away = jnp.split(both, 2)
        return away + scale * (towards - away)

    return guided_velocity
