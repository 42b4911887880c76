"""The T5 v1.1 encoder against the published one (golden files), its size and operations, its position bias."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from egrpo_jax.models.t5 import T5Config, T5Encoder, forward_flops, relative_buckets
from egrpo_jax.weights.layout import published_shapes
from egrpo_jax.weights.published.t5 import t5_layout
from tests.layouts import import_tensors
from tests.oracle.random_weights import random_tensors
from tests.oracle.t5 import CASES, GOLDEN, SEEDS, bfloat16_error, inputs

SMALL = T5Config(vocab_size=20, width=12, num_layers=2, num_heads=2, head_dim=8, mlp_dim=10)


def template(config):
    return jax.eval_shape(T5Encoder(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]


def random_params(config, dtype=jnp.float32, seed=0):
    """The parameters that the oracle has."""
    layout = t5_layout(config)
    params = import_tensors(layout, random_tensors(published_shapes(layout, template(config)), seed), template(config))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


@functools.cache
def encoder(config, dtype=jnp.float32):
    return jax.jit(T5Encoder(config, dtype=dtype, param_dtype=dtype).apply)


def encode(config, ids, params):
    return encoder(config, params["relative_bias"].dtype.type)({"params": params}, ids)


def our_outputs(case, dtype=jnp.float32, seed=0):
    """The same names as `tests.oracle.t5.outputs`."""
    return {"states": np.float32(encode(case.config, inputs(case), random_params(case.config, dtype, seed)))}


def our_bfloat16_error(case):
    """As `tests.oracle.t5.bfloat16_error`, against our own float32, which parity ties to the published one."""
    exact, rounded = ([our_outputs(case, dtype, seed) for seed in SEEDS] for dtype in (jnp.float32, jnp.bfloat16))
    return bfloat16_error(exact, rounded)


def golden(name):
    with np.load(GOLDEN) as file:
        return {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{name}/")}


def relative_error(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_parity_in_float32(name):
    states, expected = our_outputs(CASES[name])["states"], golden(name)["states"]
    chex.assert_equal_shape([states, expected])
    assert relative_error(states, expected) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_exact_as_the_published_one(name):
    error = our_bfloat16_error(CASES[name])["states"]
    assert 0 < error <= 1.2 * golden(name)["bf16_error_states"]


def test_published_parameter_count():
    leaves = jax.tree.leaves(template(T5Config()))
    assert sum(leaf.size for leaf in leaves) == 4_762_310_656


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_states_are_in_the_dtype_of_the_computation(dtype):
    states = encode(SMALL, jnp.zeros((2, 5), jnp.int32), random_params(SMALL, dtype))
    chex.assert_shape(states, (2, 5, 12))
    chex.assert_type(states, dtype)


def test_buckets_by_hand():
    """T5's 32 buckets: 16 on each side; 0 to 7 alone, then ranges from 8, 12, 16, 23, 32, 46, 64 and 91 on."""
    ranges = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    expected = np.searchsorted(ranges, np.arange(300), side="right") - 1
    buckets = relative_buckets(300, 32, 128)
    chex.assert_type(buckets, np.int32)
    np.testing.assert_array_equal(buckets[:, 0], expected)  # keys before the query
    np.testing.assert_array_equal(buckets[0, 1:], 16 + expected[1:])
    np.testing.assert_array_equal(buckets[100, 50:150], buckets[150, 100:200])  # distance alone counts


def test_the_order_of_tokens_matters_by_the_position_bias_alone():
    ids = np.random.default_rng(0).integers(0, 20, (2, 9))
    params = random_params(SMALL)
    turned = encode(SMALL, ids[:, ::-1], params)[:, ::-1]
    assert float(jnp.abs(turned - encode(SMALL, ids, params)).max()) > 1e-2
    params["relative_bias"] = jnp.zeros_like(params["relative_bias"])
    turned = encode(SMALL, ids[:, ::-1], params)[:, ::-1]
    chex.assert_trees_all_close(turned, encode(SMALL, ids, params), atol=1e-5)


def test_padding_is_attended_to_and_samples_do_not_mix():
    ids = np.array([[4, 5, 1], [6, 7, 1]])
    params = random_params(SMALL)
    states = encode(SMALL, ids, params)
    padded = encode(SMALL, np.pad(ids, ((0, 0), (0, 2))), params)
    assert float(jnp.abs(padded[:, :3] - states).max(-1).min()) > 1e-3
    chex.assert_trees_all_close(encode(SMALL, ids[:1], params)[0], states[0], atol=1e-6)


@pytest.mark.parametrize(("config", "tokens"), [(T5Config(), 512), (SMALL, 5)])
def test_operations(config, tokens):
    """Twice each kernel's size for each token, and for each pair of tokens a product of keys and one of values."""
    kernels = flatten_dict(template(config), sep="/")
    linear = sum(2 * tokens * leaf.size for path, leaf in kernels.items() if path.endswith("kernel"))
    pairs = tokens**2 * config.num_layers * config.num_heads * config.head_dim
    assert forward_flops(config, tokens) == linear + 4 * pairs
