"""ImageReward's model against the published one (golden file), its size and operations, who sees what."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from egrpo_jax.models.blip import SCORE_MEAN, SCORE_STD, Blip, BlipConfig, forward_flops
from egrpo_jax.models.layers import StackConfig
from egrpo_jax.weights.layout import published_shapes
from egrpo_jax.weights.published.blip import blip_layout
from tests.layouts import import_tensors
from tests.oracle.imagereward import CASES, GOLDEN, network_inputs
from tests.oracle.random_weights import random_tensors

SMALL = BlipConfig(
    vision=StackConfig(16, 2, 2, 24),
    text=StackConfig(12, 2, 3, 20),
    image_size=12,
    patch_size=4,
    vocab_size=30,
    length=9,
)


def template(config):
    """Shapes of the parameter tree."""
    size = config.image_size
    images, ids, mask = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 3), jnp.int32), jnp.ones((1, 3), bool)
    return jax.eval_shape(Blip(config).init, jax.random.key(0), images, ids, mask)["params"]


def random_params(config, dtype=jnp.float32):
    """The parameters that the oracle has."""
    shapes = template(config)
    layout = blip_layout(config)
    params = import_tensors(layout, random_tensors(published_shapes(layout, shapes)), shapes)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


@functools.cache
def compiled(config, dtype):
    return jax.jit(Blip(config, dtype, dtype).apply)


@functools.cache
def model(config, dtype=jnp.float32):
    return functools.partial(compiled(config, dtype), {"params": random_params(config, dtype)})


def golden(name):
    with np.load(GOLDEN) as file:
        return {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name", CASES)
def test_parity_in_float32(name):
    got, expected = model(CASES[name].config)(*network_inputs()), golden(name)["network"]
    chex.assert_equal_shape([got, expected])
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_bfloat16_is_close_and_scores_are_in_float32():
    exact = golden("patch_32")["network"]
    scores = model(CASES["patch_32"].config, jnp.bfloat16)(*network_inputs())
    chex.assert_type(scores, jnp.float32)
    assert 0 < np.abs(scores - exact).max() < 0.05


def test_published_parameter_count():
    assert sum(leaf.size for leaf in jax.tree.leaves(template(BlipConfig()))) == 446_206_689


def small_inputs():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((3, 12, 12, 3)).astype(np.float32)
    return images, rng.integers(0, 30, (3, 6)), np.arange(6) < np.array([[6], [4], [1]])


def test_padding_changes_nothing():
    images, ids, mask = small_inputs()
    scores = model(SMALL)(images, ids, mask)
    chex.assert_trees_all_close(model(SMALL)(images, np.where(mask, ids, 7), mask), scores, atol=1e-6)
    assert np.abs(model(SMALL)(images, ids, np.ones_like(mask)) - scores)[1:].min() > 1e-3


def test_a_score_depends_on_every_token_and_on_every_patch_of_its_own_row():
    images, ids, mask = small_inputs()
    scores = model(SMALL)(images, ids, mask)
    for token in range(4):
        changed = ids.copy()
        changed[1, token] = (ids[1, token] + 1) % 30
        difference = np.abs(model(SMALL)(images, changed, mask) - scores)
        assert difference[1] > 1e-4
        assert difference[[0, 2]].max() < 1e-6
    for row in range(0, 12, 4):
        changed = images.copy()
        changed[1, row, 5] += 1
        difference = np.abs(model(SMALL)(changed, ids, mask) - scores)
        assert difference[1] > 1e-4
        assert difference[[0, 2]].max() < 1e-6


def test_the_head_is_linear_and_its_output_is_normalised():
    images, ids, mask = small_inputs()
    params = random_params(SMALL)
    last = f"head_{len(SMALL.head) - 1}"
    params[last] = {"kernel": jnp.zeros_like(params[last]["kernel"]), "bias": jnp.full(1, 3.0)}
    scores = compiled(SMALL, jnp.float32)({"params": params}, images, ids, mask)
    np.testing.assert_allclose(scores, (3 - SCORE_MEAN) / SCORE_STD, rtol=1e-6)


def test_sizes_are_checked():
    images, ids, mask = small_inputs()
    with pytest.raises(ValueError, match="10 tokens, but there are positions for 9"):
        model(SMALL)(images, np.zeros((3, 10), np.int32), np.ones((3, 10), bool))
    with pytest.raises(AssertionError):
        model(SMALL)(images[:, :8], ids, mask)
    with pytest.raises(ValueError, match="num_heads 3 must divide width 16"):
        StackConfig(16, 2, 3, 24)
    with pytest.raises(ValueError, match="patch_size 16 must divide image_size 225"):
        BlipConfig(image_size=225)


@pytest.mark.parametrize(("config", "tokens"), [(BlipConfig(), 35), (SMALL, 5)])
def test_operations(config, tokens):
    """Twice each kernel's size for each token it is applied to, and two products for each pair of tokens that meet."""
    image = config.image_tokens
    applied = {"patches": image - 1, "head": 1, "image_attention/to_k": image, "image_attention/to_v": image}
    linear = 0
    for path, leaf in flatten_dict(template(config), sep="/").items():
        if path.endswith("kernel"):
            times = image if path.startswith("vision") else tokens
            times = next((count for name, count in applied.items() if name in path), times)
            linear += 2 * times * leaf.size
    pairs = config.vision.num_layers * config.vision.width * image**2
    pairs += config.text.num_layers * config.text.width * tokens * (tokens + image)
    assert forward_flops(config, tokens) == linear + 4 * pairs
