"""CLIP's text encoder against the published one (golden files), its size and operations, who sees whom."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from egrpo_jax.models.clip import (
    ClipText,
    ClipTextConfig,
    Transformer,
    TransformerConfig,
    end_positions,
    forward_flops,
    quick_gelu,
)
from egrpo_jax.weights.clip import clip_text_layout
from egrpo_jax.weights.layout import import_tensors, published_shapes
from tests.oracle.clip import CASES, GOLDEN, SEEDS, bfloat16_error, inputs
from tests.oracle.random_weights import random_tensors

SMALL = ClipTextConfig(TransformerConfig(16, 2, 2, 24, "gelu"), vocab_size=30, length=12)


def template(config):
    return jax.eval_shape(ClipText(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]


def random_params(config, dtype=jnp.float32, seed=0):
    """The parameters that the oracle has."""
    layout = clip_text_layout(config)
    params = import_tensors(layout, random_tensors(published_shapes(layout, template(config)), seed), template(config))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


@functools.cache
def encoder(config, dtype=jnp.float32):
    return jax.jit(ClipText(config, dtype=dtype, param_dtype=dtype).apply)


def encode(config, ids, dtype=jnp.float32, seed=0):
    return encoder(config, dtype)({"params": random_params(config, dtype, seed)}, ids)


def our_outputs(case, dtype=jnp.float32, seed=0):
    """The same names as `tests.oracle.clip.outputs`."""
    features = encode(case.config, inputs(case), dtype, seed)
    return {name: np.float32(array) for name, array in features._asdict().items()}


def our_bfloat16_error(case):
    """As `tests.oracle.clip.bfloat16_error`, against our own float32, which parity ties to the published one."""
    exact, rounded = ([our_outputs(case, dtype, seed) for seed in SEEDS] for dtype in (jnp.float32, jnp.bfloat16))
    return bfloat16_error(exact, rounded)


def golden(name):
    with np.load(GOLDEN) as file:
        return {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{name}/")}


def relative_error(got, expected):
    return np.abs(got - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_parity_in_float32(name):
    expected = golden(name)
    for key, array in our_outputs(CASES[name]).items():
        chex.assert_equal_shape([array, expected[key]])
        assert relative_error(array, expected[key]) <= 1e-5, key


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_exact_as_the_published_one(name):
    expected = golden(name)
    for key, error in our_bfloat16_error(CASES[name]).items():
        assert 0 < error <= 1.2 * expected[f"bf16_error_{key}"], key


def test_published_parameter_count():
    leaves = jax.tree.leaves(template(ClipTextConfig()))
    assert sum(leaf.size for leaf in leaves) == 123_060_480


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_results_are_in_the_dtype_of_the_computation(dtype):
    features = encode(SMALL, jnp.zeros((2, 5), jnp.int32), dtype)
    chex.assert_shape(list(features), [(2, 5, 16), (2, 16)])
    chex.assert_type(list(features), dtype)


def test_tokens_see_only_those_before_them():
    ids = np.random.default_rng(0).integers(0, 30, (2, 9))
    changed = ids.copy()
    changed[0, 4] = (ids[0, 4] + 1) % 30
    before, after = encode(SMALL, ids).states, encode(SMALL, changed).states
    chex.assert_trees_all_close(before[0, :4], after[0, :4], atol=1e-6)
    chex.assert_trees_all_close(before[1], after[1], atol=1e-6)
    assert float(jnp.abs(before[0, 4:] - after[0, 4:]).max(-1).min()) > 1e-3


def test_what_follows_the_end_does_not_matter_to_the_pooled_state():
    ids = np.array([[3, 8, 29, 29, 29, 29], [3, 8, 29, 0, 1, 2], [3, 8, 29, 5, 29, 1]])
    pooled = encode(SMALL, ids).pooled
    chex.assert_trees_all_close(pooled[1:], jnp.stack([pooled[0]] * 2), atol=1e-6)


def test_end_positions_by_hand():
    ids = jnp.array([[5, 9, 2, 9], [9, 1, 2, 2], [0, 2, 7, 3]])
    np.testing.assert_array_equal(end_positions(ids, None), [1, 0, 2])
    np.testing.assert_array_equal(end_positions(ids, 2), [2, 2, 1])


def test_quick_gelu_by_its_formula():
    x = np.linspace(-6, 6, 41)
    np.testing.assert_allclose(quick_gelu(jnp.asarray(x)), x / (1 + np.exp(-1.702 * x)), atol=1e-6)


def test_the_stack_without_a_mask_sees_both_ways():
    model = Transformer(TransformerConfig(16, 2, 2, 24, "gelu"), jnp.float32, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    apply = jax.jit(functools.partial(model.apply, variables))
    expected = apply(x)
    chex.assert_trees_all_close(apply(x, jnp.ones((1, 1, 6, 6), bool)), expected, atol=1e-5)
    assert float(jnp.abs(apply(x.at[0, 5, 0].add(1.0)) - expected)[0].max(-1).min()) > 1e-4
    chex.assert_trees_all_close(apply(x[:, ::-1])[:, ::-1], expected, atol=1e-5)  # positions come from outside


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="13 tokens, but there are positions for 12"):
        ClipText(SMALL).init(jax.random.key(0), jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(ValueError, match="num_heads 3 must divide width 16"):
        TransformerConfig(16, 2, 3, 24, "gelu")


@pytest.mark.parametrize(("config", "tokens"), [(ClipTextConfig(), 77), (SMALL, 5)])
def test_operations(config, tokens):
    """Twice each kernel's size for each token, and for each pair of tokens a product of keys and one of values."""
    kernels = flatten_dict(template(config)["transformer"], sep="/")
    linear = sum(2 * tokens * leaf.size for path, leaf in kernels.items() if path.endswith("kernel"))
    pairs = tokens**2 * config.transformer.num_layers * config.transformer.width
    assert forward_flops(config.transformer, tokens) == linear + 4 * pairs
