"""CLIP's text encoder against the published one (golden files), sizes and operations of both towers, who sees whom.

That both towers together give the published vectors is tested with the rewards.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from egrpo_jax.models.clip import (
    Clip,
    ClipConfig,
    ClipText,
    ClipTextConfig,
    ClipVisionConfig,
    LinearHead,
    Transformer,
    TransformerConfig,
    end_positions,
    image_flops,
    quick_gelu,
)
from egrpo_jax.models.layers import stack_flops
from egrpo_jax.weights.layout import published_shapes
from egrpo_jax.weights.published.clip import clip_text_layout
from tests.layouts import import_tensors
from tests.oracle.clip import CASES, GOLDEN, SEEDS, bfloat16_error, inputs
from tests.oracle.random_weights import random_tensors

SMALL = ClipTextConfig(TransformerConfig(16, 2, 2, 24, "gelu"), vocab_size=30, length=12)
SMALL_CLIP = ClipConfig(ClipVisionConfig(TransformerConfig(12, 2, 3, 20, "gelu"), 17, 5), SMALL, dim=6)


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
    chex.assert_shape(list(features), [(2, 5, 16), (2, 16), (2, 5, 16)])
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
    apply = jax.jit(lambda *args: model.apply(variables, *args)[0])
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
    assert stack_flops(config.transformer, tokens) == linear + 4 * pairs


def clip_shapes(config):
    size = config.vision.image_size
    images, ids = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Clip(config).init, jax.random.key(0), images, ids)


@functools.cache
def small_clip():
    """A model, its variables, and 3 images and texts."""
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), clip_shapes(SMALL_CLIP))
    return Clip(SMALL_CLIP), variables, rng.standard_normal((3, 17, 17, 3), np.float32), rng.integers(0, 30, (3, 7))


def test_images_and_texts_are_unit_vectors_and_their_scaled_cosines_the_logits():
    model, variables, images, ids = small_clip()
    by_image, by_text = ("encode_images", images), ("encode_text", ids)
    apply = lambda variables: [model.apply(variables, given, method=name) for name, given in (by_image, by_text)]
    vectors, logits = jax.jit(lambda variables: (apply(variables), model.apply(variables, images, ids)))(variables)
    for unit in vectors:
        chex.assert_shape(unit, (3, 6))
        np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, atol=1e-6)
    scale = np.exp(variables["params"]["logit_scale"])
    np.testing.assert_allclose(logits, scale * (vectors[0] * vectors[1]).sum(-1), rtol=1e-5, atol=1e-6)


def test_an_image_is_seen_up_to_its_last_whole_patch():
    """17 pixels are three patches of 5, and 2 that no patch is in."""
    model, variables, images, _ = small_clip()
    encode = jax.jit(functools.partial(model.apply, method="encode_images"))
    before = encode(variables, images)
    changed = images.copy()
    changed[0, 15:] += 1
    changed[1, 14, 14] += 1
    difference = np.abs(encode(variables, changed) - before).max(-1)
    assert difference[0] == difference[2] == 0
    assert difference[1] > 1e-3
    with pytest.raises(AssertionError):
        encode(variables, images[:, :16])


@pytest.mark.parametrize("config", [ClipConfig(), SMALL_CLIP])
def test_operations_of_an_image(config):
    """Those of its patches, of the stack and of the projection."""
    params = clip_shapes(config)["params"]
    patches = 2 * (config.vision.tokens - 1) * params["vision"]["patches"]["kernel"].size
    stack = stack_flops(config.vision.transformer, config.vision.tokens)
    assert image_flops(config) == patches + stack + 2 * params["image_projection"]["kernel"].size
    if config == ClipConfig():
        assert 3.3e11 < image_flops(config) < 3.4e11


def test_a_linear_head_is_one_matrix():
    head, x = LinearHead((5, 3, 1)), jax.random.normal(jax.random.key(0), (4, 7))
    variables = jax.jit(head.init)(jax.random.key(1), x)
    kernels = [variables["params"][f"layer_{index}"]["kernel"] for index in range(3)]
    np.testing.assert_allclose(head.apply(variables, x), x @ kernels[0] @ kernels[1] @ kernels[2], atol=1e-5)
