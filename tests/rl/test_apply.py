"""An update where the optimizer's state rests on the host: the same one, a layer at a time."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from egrpo_jax.common.offload import HOST, on_host
from egrpo_jax.rl.apply import apply_gradient
from egrpo_jax.rl.optimizer import OptimConfig, make_optimizer

KEYS = jax.random.split(jax.random.key(0), 2)
PARAMS = {
    "blocks": {"kernel": jax.random.normal(KEYS[0], (5, 8, 16)), "bias": jnp.ones((5, 16))},
    "head": jax.random.normal(KEYS[1], (8, 4)),
    "scale": jnp.ones(3),
}
GRADS = jax.tree.map(lambda p: 3 * p + 1, PARAMS)
CONFIGS = [OptimConfig(learning_rate=1e-2, warmup_updates=3), OptimConfig(first_moment_dtype="bfloat16", grad_clip=1e9)]


def on_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def run(optimizer, state, steps=3, grads=GRADS):
    apply, params = jax.jit(functools.partial(apply_gradient, optimizer)), PARAMS
    for _ in range(steps):
        params, state, sound, norm = apply(jnp.zeros(()), optax.tree.norm(grads), grads, state, params)
    return params, state, sound, norm


def resting(optimizer):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return on_host(jax.device_put(optimizer.init(PARAMS), where))


def kinds(state):
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state) if leaf.ndim}


@pytest.mark.parametrize("config", CONFIGS)
def test_it_is_the_update_of_a_state_on_the_device(config):
    optimizer = make_optimizer(config)
    expected, found = run(optimizer, optimizer.init(PARAMS)), run(optimizer, resting(optimizer))
    chex.assert_trees_all_close(on_numpy(found), on_numpy(expected), rtol=1e-6, atol=1e-7)
    assert kinds(found[1]) == {HOST}
    assert HOST not in kinds(expected[1])


@pytest.mark.parametrize("poison", ["blocks", "head"])
def test_nothing_of_it_is_applied_where_one_layer_would_not_be_finite(poison):
    optimizer = make_optimizer(CONFIGS[0])
    leaf = (
        GRADS["blocks"]["kernel"].at[3, 2, 1].set(jnp.inf) if poison == "blocks" else GRADS["head"].at[0].set(jnp.nan)
    )
    bad = GRADS | ({"blocks": GRADS["blocks"] | {"kernel": leaf}} if poison == "blocks" else {"head": leaf})
    state = resting(optimizer)
    params, after, sound, _ = run(optimizer, state, steps=1, grads=bad)
    assert not sound
    chex.assert_trees_all_equal(params, PARAMS)
    chex.assert_trees_all_equal(on_numpy(after), on_numpy(state))


def test_a_norm_that_is_given_is_the_one_that_gradients_are_clipped_by():
    optimizer = make_optimizer(OptimConfig(learning_rate=1.0, grad_clip=1.0, b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0))
    part, state = {"head": GRADS["head"]}, optimizer.init({"head": PARAMS["head"]})
    clipped = lambda **known: -optimizer.update(part, state, {"head": PARAMS["head"]}, **known)[0]["head"]
    restated = lambda grad: grad / (jnp.abs(grad) + 1)  # AdamW without memory
    chex.assert_trees_all_close(clipped(), restated(part["head"] / optax.tree.norm(part)), rtol=1e-6)
    chex.assert_trees_all_close(clipped(norm=jnp.float32(8.0)), restated(part["head"] / 8), rtol=1e-6)
    chex.assert_trees_all_close(clipped(norm=jnp.float32(0.5)), restated(part["head"]), rtol=1e-6)
