"""The layers that models share, against formulas and flax; the loop over blocks against the blocks one by one."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.models import layers
from egrpo_jax.models.lora import apply_lora


def test_sinusoid_has_cosines_first_and_a_factor_of_1000():
    angles = 1000 * 0.3 * 10_000.0 ** (-np.arange(128) / 128)
    expected = np.concatenate([np.cos(angles), np.sin(angles)])
    chex.assert_trees_all_close(layers.sinusoid(jnp.array([0.3]))[0], expected.astype(np.float32), atol=1e-4)


def test_layer_norm_against_flax():
    x = jax.random.normal(jax.random.key(0), (3, 7, 20)) * 5 + 2
    reference = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False)
    chex.assert_trees_all_close(layers.layer_norm(x), reference.apply({}, x), atol=1e-5)


def test_the_variance_of_a_layer_norm_does_not_cancel():
    x = 1e4 + jnp.array([[-1.0, 0.0, 1.0]])
    norm = layers.LayerNorm()
    expected = jnp.array([[-1.0, 0.0, 1.0]]) * np.sqrt(1.5)
    chex.assert_trees_all_close(norm.apply(norm.init(jax.random.key(0), x), x), expected, rtol=1e-4)


def test_normalise_leaves_zero_alone():
    np.testing.assert_array_equal(layers.normalise(jnp.zeros((1, 3))), 0)
    np.testing.assert_allclose(layers.normalise(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)


def test_activations_are_rounded_once():
    x = jnp.linspace(-4, 4, 101).astype(jnp.bfloat16)
    for ours, exact in ((layers.gelu, nn.gelu), (layers.silu, nn.silu)):
        chex.assert_trees_all_equal(ours(x), exact(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_heads_must_fill_the_width():
    with pytest.raises(ValueError, match="num_heads 3 must divide width 16"):
        layers.StackConfig(16, 2, 3, 24)


class Step(nn.Module):
    """A block with two streams and two arguments that all blocks share."""

    @nn.compact
    def __call__(self, streams, shift, scales):
        first, second = streams
        mixed = layers.Linear(first.shape[-1], name="mix")(first + shift) * scales["first"]
        return (second, mixed + second * scales["second"]), None


STREAMS = (jnp.array([[1.0, -2.0]]), jnp.array([[0.5, 3.0]]))
SHARED = (jnp.array([0.1, 0.2]), {"first": 0.7, "second": jnp.array([1.1, 0.4])})


@pytest.mark.parametrize("remat", ["none", "projections", "blocks"])
@pytest.mark.parametrize("unroll", [1, 3])
def test_scanned_blocks_are_the_blocks_one_by_one(remat, unroll):
    stack = layers.scan_blocks(Step, 3, remat, unroll)()
    params = stack.init(jax.random.key(0), STREAMS, *SHARED)["params"]
    adapters = {"mix": {"a": jnp.ones((3, 2, 1)), "b": jnp.arange(6.0).reshape(3, 1, 2)}}
    streams = STREAMS
    for index in range(3):
        block = jax.tree.map(lambda leaf, index=index: leaf[index], {"params": params, "lora": adapters})
        streams, _ = apply_lora(Step(), block, streams, *SHARED, scale=0.5)
    variables = {"params": params, "lora": adapters}
    chex.assert_trees_all_close(apply_lora(stack, variables, STREAMS, *SHARED, scale=0.5)[0], streams, rtol=1e-5)
    assert len(np.unique(params["mix"]["kernel"])) == 3 * 4  # each block has its own random numbers
