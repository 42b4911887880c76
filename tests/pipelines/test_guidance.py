"""Classifier-free guidance: one pass over both prompts is what two passes give, forward and backward."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.pipelines.guidance import NEGATIVE, guided


class Text(NamedTuple):
    states: chex.Array
    length: chex.Array


def velocity(params, latents, time, text):
    """One whose rows depend on nothing but themselves."""
    mean = (text.states.sum(1) / text.length[:, None])[:, None]
    return jnp.tanh(latents @ params["flow"] + mean * time[:, None, None])


def arguments(seed=0, batch=3):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    negative = {"states": normal(5, 4), "length": np.int32(2)}
    params = {"flow": normal(4, 4), NEGATIVE: negative}
    return (
        params,
        normal(batch, 6, 4),
        normal(batch),
        Text(normal(batch, 5, 4), np.arange(1, batch + 1, dtype=np.int32)),
    )


def restated(scale, params, latents, time, text):
    """Each sample, each prompt by itself."""
    rows = []
    for row in range(len(latents)):
        one = lambda states, length: velocity(
            params, latents[row : row + 1], time[row : row + 1], Text(jnp.asarray(states)[None], jnp.asarray([length]))
        )[0]
        positive, negative = one(text.states[row], text.length[row]), one(**params[NEGATIVE])
        rows.append((1 - scale) * negative + scale * positive)
    return jnp.stack(rows)


@pytest.mark.parametrize("scale", [1.0, 0.5, 4.5])
def test_both_prompts_in_one_pass(scale):
    params, *inputs = arguments()
    expected = restated(scale, params, *inputs)
    chex.assert_trees_all_close(jax.jit(guided(velocity, scale))(params, *inputs), expected, rtol=1e-5, atol=1e-6)


def test_gradients_pass_through_both_prompts():
    params, *inputs = arguments(1)

    def loss(flow, of):
        return jnp.square(of({**params, "flow": flow}, *inputs)).sum()

    found = jax.grad(loss)(params["flow"], guided(velocity, 3.0))
    expected = jax.grad(loss)(params["flow"], lambda *all_of_it: restated(3.0, *all_of_it))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_model_is_called_once_over_twice_the_samples():
    calls = []

    def counted(params, latents, time, text):
        calls.append(latents.shape)
        return velocity(params, latents, time, text)

    guided(counted, 2.0)(*arguments(batch=4))
    assert calls == [(8, 6, 4)]
