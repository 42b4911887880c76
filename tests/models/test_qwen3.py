"""Qwen3 against the published one (golden files), its size and operations, what a token's states depend on."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from egrpo_jax.models.qwen3 import Qwen3, Qwen3Config, forward_flops, rotate_halves
from egrpo_jax.weights.layout import published_shapes
from egrpo_jax.weights.published.qwen3 import qwen3_layout
from tests.layouts import import_tensors
from tests.oracle.qwen3 import CASES, GOLDEN, SEEDS, bfloat16_error, inputs
from tests.oracle.random_weights import random_tensors

KLEIN, Z_IMAGE = (9, 18, 27), (35,)
SMALL = Qwen3Config(
    vocab_size=20, width=12, num_layers=5, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=10, theta=100
)


def template(config, layers):
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Qwen3(config, layers).init, jax.random.key(0), ids, ids.update(dtype=bool))["params"]


def random_params(config, layers, dtype=jnp.float32, seed=0):
    """The parameters that the oracle has."""
    layout, abstract = qwen3_layout(max(layers)), template(config, layers)
    params = import_tensors(layout, random_tensors(published_shapes(layout, abstract), seed), abstract)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


@functools.cache
def encoder(config, layers, dtype=jnp.float32):
    return jax.jit(Qwen3(config, layers, dtype, dtype).apply)


def encode(ids, mask=None, layers=(1, 3), params=None, config=SMALL):
    ids = np.asarray(ids)
    params = random_params(config, layers) if params is None else params
    return encoder(config, layers)({"params": params}, ids, np.ones(ids.shape, bool) if mask is None else mask)


def our_outputs(case, dtype=jnp.float32, seed=0):
    """The same names as `tests.oracle.qwen3.outputs`."""
    params = random_params(case.config, case.layers, dtype, seed)
    return {"states": np.float32(encoder(case.config, case.layers, dtype)({"params": params}, *inputs(case)))}


def our_bfloat16_error(case):
    """As `tests.oracle.qwen3.bfloat16_error`, against our own float32, which parity ties to the published one."""
    exact, rounded = ([our_outputs(case, dtype, seed) for seed in SEEDS] for dtype in (jnp.float32, jnp.bfloat16))
    return bfloat16_error(exact, rounded)


def golden(name):
    with np.load(GOLDEN) as file:
        return {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{name}/")}


def relative_error(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_parity_in_float32(name):
    """At padding too: FLUX.2-klein attends to the states there."""
    states, expected = our_outputs(CASES[name])["states"], golden(name)["states"]
    chex.assert_equal_shape([states, expected])
    assert relative_error(states, expected) <= 1e-5
    padding = ~inputs(CASES[name])[1]
    assert relative_error(states[padding], expected[padding]) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_exact_as_the_published_one(name):
    error = our_bfloat16_error(CASES[name])["states"]
    assert 0 < error <= 1.2 * golden(name)["bf16_error_states"]


@pytest.mark.parametrize(("layers", "count"), [(KLEIN, 3_114_088_192), (Z_IMAGE, 3_921_534_720)])
def test_only_the_layers_that_are_needed_have_parameters(layers, count):
    """Of 4,022,468,096; klein's are 6.2 GB in bfloat16."""
    params = template(Qwen3Config(), layers)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["blocks"])} == {max(layers)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_states_are_in_the_dtype_of_the_computation(dtype):
    params = random_params(SMALL, (1, 3), dtype)
    states = encoder(SMALL, (1, 3), dtype)({"params": params}, jnp.zeros((2, 5), jnp.int32), jnp.ones((2, 5), bool))
    chex.assert_shape(states, (2, 5, 24))
    chex.assert_type(states, dtype)


def test_states_are_in_the_order_of_the_layers():
    ids = np.random.default_rng(0).integers(0, 20, (2, 7))
    params = random_params(SMALL, (1, 3))
    first, third = np.split(np.asarray(encode(ids, params=params)), 2, axis=-1)
    np.testing.assert_array_equal(encode(ids, layers=(3, 1), params=params), np.concatenate([third, first], -1))
    np.testing.assert_array_equal(encode(ids, layers=(3,), params=params), third)
    chex.assert_trees_all_close(encode(ids, layers=(1,)), first, atol=1e-6)


def test_states_are_not_normalised():
    """Each is the one before and what a block adds to it: the last has no norm either."""
    ids = np.random.default_rng(0).integers(0, 20, (2, 7))
    params = random_params(SMALL, (1, 3))
    silent = {**params, "blocks": jax.tree.map(np.array, params["blocks"])}
    for name in ("out", "mlp_out"):
        silent["blocks"][name]["kernel"][1:] = 0  # only the first block adds something
    first, third = np.split(np.asarray(encode(ids, params=silent)), 2, axis=-1)
    np.testing.assert_array_equal(first, third)
    assert float(np.square(first).mean()) != pytest.approx(1, abs=0.1)


def test_a_token_depends_on_what_is_before_it_alone():
    ids = np.random.default_rng(0).integers(0, 20, (1, 9))
    changed = ids.copy()
    changed[0, 5] = (ids[0, 5] + 1) % 20
    difference = np.abs(np.asarray(encode(changed) - encode(ids))).max(-1)[0]
    assert (difference[:5] == 0).all()
    assert (difference[5:] > 1e-3).all()


def test_padding_is_attended_to_by_none_and_samples_do_not_mix():
    ids = np.random.default_rng(0).integers(0, 20, (2, 9))
    mask = np.arange(9) < np.array([[4], [9]])
    states = encode(ids, mask)
    changed = ids.copy()
    changed[0, 4] = (ids[0, 4] + 1) % 20
    difference = np.abs(np.asarray(encode(changed, mask) - states)).max(-1)
    assert difference[0, 4] > 1e-3  # its own embedding
    assert (np.delete(difference[0], 4) == 0).all()
    assert (difference[1] == 0).all()
    chex.assert_trees_all_close(states[0, :4], encode(ids[:1, :4])[0], atol=1e-5)


def test_each_key_head_serves_neighbouring_query_heads():
    """Heads 0 and 1 of the queries have the first of two heads of keys and values, 2 and 3 the second."""
    ids = np.random.default_rng(0).integers(0, 20, (1, 6))
    params = random_params(SMALL, (1,))
    params["blocks"]["mlp_out"]["kernel"] *= 0
    of_second_heads = params["blocks"]["out"]["kernel"].at[:, :16].set(0)

    def states(value):
        blocks = {**params["blocks"], "out": {"kernel": of_second_heads}, "to_v": {"kernel": value}}
        return encode(ids, layers=(1,), params={**params, "blocks": blocks})

    value = params["blocks"]["to_v"]["kernel"]
    np.testing.assert_array_equal(states(value.at[..., :8].add(1)), states(value))
    assert float(jnp.abs(states(value.at[..., 8:].add(1)) - states(value)).max()) > 1e-2


def test_halves_are_rotated_together():
    x = np.random.default_rng(0).standard_normal((1, 2, 1, 8)).astype(np.float32)
    angles = np.array([[0, 0, 0, 0], [1, 0.5, 0, -2]], np.float32)
    got = np.asarray(rotate_halves(x, np.cos(angles), np.sin(angles)))[0, :, 0]
    np.testing.assert_array_equal(got[0], x[0, 0, 0])
    pairs = (x[0, 1, 0, :4] + 1j * x[0, 1, 0, 4:]) * np.exp(1j * angles[1])
    np.testing.assert_allclose(got[1, :4] + 1j * got[1, 4:], pairs, atol=1e-6)


@pytest.mark.parametrize("layers", [(), (0, 3), (5,)])
def test_layers_that_have_no_states(layers):
    """The published states after the last layer are normed."""
    with pytest.raises(ValueError, match=r"layers \(.*\) must be one or more from 1 to 4"):
        template(SMALL, layers)


def test_impossible_sizes():
    with pytest.raises(ValueError, match="num_kv_heads 5 must divide num_heads 32"):
        Qwen3Config(num_kv_heads=5)
    with pytest.raises(ValueError, match="head_dim 7 must be even"):
        Qwen3Config(head_dim=7)


@pytest.mark.parametrize(("config", "layers", "tokens"), [(Qwen3Config(), KLEIN, 512), (SMALL, (1, 3), 5)])
def test_operations(config, layers, tokens):
    """Twice each kernel's size for each token, and for each pair of tokens a product of keys and one of values."""
    kernels = flatten_dict(template(config, layers), sep="/")
    linear = sum(2 * tokens * leaf.size for path, leaf in kernels.items() if path.endswith("kernel"))
    pairs = tokens**2 * max(layers) * config.num_heads * config.head_dim
    assert forward_flops(config, tokens, layers) == linear + 4 * pairs
