r"""Losses without log-probabilities of transitions: DiffusionNFT, AWM and V-GRPO, the rivals of a GRPO of steps.

They never look at how a sample was made. A finished sample x_0, "data" here, is noised again, and the velocity at
what comes out says how likely the policy makes it:

    x_t = (1 - t) x_0 + t e,    v = e - x_0,    ^x_0 = x_t - t v.

Everything is a function of arrays: latents, and what is shaped like them, are `[..., N, D]` in float32, times and
advantages `[...]`, from 0 (data) to 1 (noise); means are over tokens and channels, N and D.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.flow.grid import Times
from egrpo_jax.flow.transition import over_latents

_LATENT_AXES = (-2, -1)
_ERROR_FLOOR = 1e-5
_POWER = 0.25
_POWER_OFFSET = 1e-10


def noised(data: chex.Array, noise: chex.Array, time: chex.Array) -> chex.Array:
    """The latents x_t = (1 - t) x_0 + t e of the forward process, `[..., N, D]`.

    Args:
      data: x_0, a finished sample; `[..., N, D]`.
      noise: e, standard normal; the same shape.
      time: t; `[...]`.
    """
    _check_shapes(time, data, noise)
    t = over_latents(time, data)
    return (1 - t) * data + t * noise


def nft_loss(
    velocity: chex.Array,
    old_velocity: chex.Array,
    latents: chex.Array,
    data: chex.Array,
    time: chex.Array,
    advantage: chex.Array,
    *,
    strength: float,
    advantage_clip: float = 5.0,
) -> chex.Array:
    r"""The loss of DiffusionNFT for each sample and time (arXiv:2509.16117; the weights as its code has them).

        v+ = b v + (1 - b) v_old,    v- = (1 + b) v_old - b v,    r = clip(1/2 + clip(A, -c, c) / (2 c), 0, 1),
        l = c [r E(v+) + (1 - r) E(v-)] / b,

    with E the error of `vgrpo_error`. A good sample draws the policy to itself; a bad one draws its mirror image at
    the old policy there, and so the policy away. A caller adds `velocity_penalty` to a reference, 1e-4 times.

    Args:
      velocity: v of the policy at `latents`; `[..., N, D]`.
      old_velocity: v_old, of the policy that sampled, or of its moving average. Has no gradient.
      latents: x_t, see `noised`.
      data: x_0.
      time: t; `[...]`.
      advantage: A; `[...]`.
      strength: b > 0, how far each branch lies from v_old; 1, and 0.1 for several rewards, in the published code.
      advantage_clip: c, the advantage that counts as certainly good.
    """
    _check_shapes(time, velocity, old_velocity, latents, data)
    chex.assert_equal_shape([time, advantage])
    old = jax.lax.stop_gradient(old_velocity)
    good = vgrpo_error(strength * velocity + (1 - strength) * old, latents, data, time)
    bad = vgrpo_error((1 + strength) * old - strength * velocity, latents, data, time)
    share = jnp.clip(0.5 + jnp.clip(advantage, -advantage_clip, advantage_clip) / (2 * advantage_clip), 0, 1)
    return advantage_clip * (share * good + (1 - share) * bad) / strength


def vgrpo_error(velocity: chex.Array, latents: chex.Array, data: chex.Array, time: chex.Array) -> chex.Array:
    r"""The error of the predicted data, over its own size: mean (^x_0 - x_0)^2 / sg(mean |^x_0 - x_0|), `[...]`.

    V-GRPO (arXiv:2604.23380) takes -L for the log-density of a sample, L being the mean of this over its N pairs (t,
    e), which the caller takes before `density_ratio`. The size has no gradient, and is at least 1e-5: that floor is
    DiffusionNFT's; V-GRPO states none, and without one a perfect prediction would be 0 / 0.

    Args:
      velocity: v at `latents`; `[..., N, D]`.
      latents: x_t, see `noised`.
      data: x_0.
      time: t; `[...]`.
    """
    _check_shapes(time, velocity, latents, data)
    error = latents - over_latents(time, latents) * velocity - data
    size = jnp.maximum(jnp.abs(error).mean(_LATENT_AXES), _ERROR_FLOOR)
    return jnp.square(error).mean(_LATENT_AXES) / jax.lax.stop_gradient(size)


def awm_log_density(velocity: chex.Array, data: chex.Array, noise: chex.Array, time: chex.Array) -> chex.Array:
    r"""The log-density of a sample as AWM has it, from the error of its velocity; `[...]`.

        lp = -t ((m + 1e-10)^p - (1e-10)^p) / p,    m = mean (v - (e - x_0))^2,    p = 1/4.

    This is "ghuber", the default of the code that the authors of Advantage Weighted Matching published. It computes in
    float64; float32 rounds lp, which is of order 1, by about 1e-6, and on the policy the ratio is 1 exactly.

    Args:
      velocity: v at the latents `noised(data, noise, time)`; `[..., N, D]`.
      data: x_0.
      noise: e.
      time: t; `[...]`.
    """
    _check_shapes(time, velocity, data, noise)
    error = jnp.square(velocity - (noise - data)).mean(_LATENT_AXES)
    return -time * ((error + _POWER_OFFSET) ** _POWER - _POWER_OFFSET**_POWER) / _POWER


def density_ratio(log_density: chex.Array, old_log_density: chex.Array) -> chex.Array:
    """The ratio r = exp(lp - lp_old) that a clipped loss takes; any shape.

    Where the batch has one update only, `old_log_density` is `log_density` itself: it has no gradient, so r is 1 and
    its gradient that of lp, without a second evaluation of the network.

    Args:
      log_density: lp of the policy: `awm_log_density`, or -L of `vgrpo_error`.
      old_log_density: the same of the policy that sampled, at the same times and noise. Has no gradient.
    """
    chex.assert_equal_shape([log_density, old_log_density])
    return jnp.exp(log_density - jax.lax.stop_gradient(old_log_density))


def on_policy_soft_clip(advantage: chex.Array, eta: float) -> chex.Array:
    """The advantage eta tanh(A / eta), of any shape: on the policy no ratio limits a step (V-GRPO, arXiv:2604.23380).

    Args:
      advantage: A.
      eta: the bound on |A|; 3 to 5 as published.
    """
    return eta * jnp.tanh(advantage / eta)


def velocity_penalty(velocity: chex.Array, reference: chex.Array) -> chex.Array:
    """The distance mean (v - v_ref)^2 of two policies, `[...]`: the KL term of DiffusionNFT and AWM but for a factor.

    Args:
      velocity: v of the policy; `[..., N, D]`.
      reference: v_ref at the same latents, of the first weights or of a moving average. Has no gradient.
    """
    chex.assert_equal_shape([velocity, reference])
    return jnp.square(velocity - jax.lax.stop_gradient(reference)).mean(_LATENT_AXES)


def stratified_times(key: chex.PRNGKey, times: Times, count: int) -> chex.Array:
    """One time from each of `count` strata of a rollout's schedule, noisiest first: AWM's and V-GRPO's; `[count]`.

    As read here, the times at which the rollout evaluated the network are the candidates, and nothing between them.
    The n of them are cut at j n / count, rounded down, and each stratum draws one of its own with equal chances.

    Args:
      key: of the samples that share these times.
      times: the grid of the rollout or its beginning, n + 1 times of which the last is never drawn.
      count: times to draw.

    Raises:
      ValueError: there are fewer steps than times to draw.
    """
    num_candidates = len(times) - 1
    _check_count(count, num_candidates)
    bounds = np.arange(count + 1) * num_candidates // count
    index = jax.random.randint(key, (count,), bounds[:-1], bounds[1:])
    return jnp.asarray(times, jnp.float32)[index]


def permuted_times(key: chex.PRNGKey, times: Times, count: int) -> chex.Array:
    """DiffusionNFT's times: `count` of the rollout's T, in random order, none twice; `[count]`.

    As read here, the order is drawn first and its first `count` are taken, so which are left out is random too. Each
    sample has an order of its own: map over keys.

    Args:
      key: of one sample.
      times: the grid of the rollout, T + 1 times of which the last, 0, is never drawn.
      count: times to draw; 9 of 10 as published.

    Raises:
      ValueError: there are fewer steps than times to draw.
    """
    _check_count(count, len(times) - 1)
    return jax.random.permutation(key, jnp.asarray(times[:-1], jnp.float32))[:count]


def _check_count(count: int, num_candidates: int) -> None:
    if not 1 <= count <= num_candidates:
        raise ValueError(f"expected to draw 1 to {num_candidates} times, one for each step there is, found {count}")


def _check_shapes(time: chex.Array, *arrays: chex.Array) -> None:
    chex.assert_equal_shape(arrays)
    chex.assert_shape(time, arrays[0].shape[:-2])
