"""Kernels in int8: what rounding does to them, and that layers read them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_dtypes import bfloat16

from egrpo_jax.common.boxes import Box
from egrpo_jax.models.int8 import Int8, int8_kernels, quantise
from egrpo_jax.models.layers import Linear


def kernel(*shape, seed=0):
    """Channels of sizes from 1e-6 to 1e3."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * 10 ** rng.uniform(-6, 3, shape[-1])).astype(np.float32)


@pytest.mark.parametrize("shape", [(64, 32), (3, 20, 7), (1, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_an_error_is_at_most_half_a_step_of_its_channel(shape, dtype):
    exact = np.clip(kernel(*shape), -6e4, 6e4).astype(dtype).astype(np.float64)
    stored = quantise(exact.astype(dtype))
    assert (stored.values.dtype, stored.scale.dtype) == (np.int8, np.float32)
    assert (stored.shape, stored.scale.shape) == (shape, (*shape[:-2], 1, shape[-1]))
    step = np.abs(exact).max(-2, keepdims=True) / 127
    np.testing.assert_allclose(stored.scale, step, rtol=1e-6)
    error = np.abs(np.asarray(nn.meta.unbox(stored), np.float64) - exact)
    assert (error <= 0.5001 * step).all()
    assert np.abs(stored.values).max() == 127


def test_halves_are_rounded_to_even_and_signs_are_alike():
    values = np.array([127, -127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5], np.float32)[:, None]
    np.testing.assert_array_equal(quantise(values).values[:, 0], [127, -127, 0, 2, 2, 0, -2, -2])


@pytest.mark.parametrize("largest", [0, 1e-45, 1e-40, 1e-38, 3e38])
def test_channels_of_nothing_and_of_extremes(largest):
    stored = quantise(np.array([[largest, 1], [-largest, 0]], np.float32))
    assert np.isfinite(nn.meta.unbox(stored)).all()
    np.testing.assert_allclose(nn.meta.unbox(stored)[0], [largest, 1], atol=1e-37)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_stored(bad):
    weights = kernel(4, 3)
    weights[2, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantise(weights)


def test_only_the_kernels_that_are_meant():
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.bfloat16)
    params = {"blocks": {"out": {"kernel": shape(3, 8, 4), "bias": shape(3, 4)}}, "last": {"kernel": shape(4, 2)}}
    stored = int8_kernels(params, "^blocks/.*/kernel$")
    expected = Int8(jax.ShapeDtypeStruct((3, 8, 4), jnp.int8), jax.ShapeDtypeStruct((3, 1, 4), jnp.float32))
    assert stored == {"blocks": {"out": {**params["blocks"]["out"], "kernel": expected}}, "last": params["last"]}


def test_a_layer_reads_it_rounded_once():
    x, exact = jnp.ones((2, 16), jnp.bfloat16), kernel(16, 8)
    layer = Linear(8, dtype=jnp.bfloat16, use_bias=False)
    stored = jax.tree.map(jnp.asarray, quantise(exact))
    read = (stored.values.astype(np.float32) * stored.scale).astype(jnp.bfloat16)
    outputs = [layer.apply({"params": {"kernel": each}}, x) for each in (stored, read)]
    np.testing.assert_array_equal(*outputs)


def test_boxes_are_not_written():
    with pytest.raises(TypeError, match="a Int8 is only read"):
        quantise(kernel(2, 2)).replace_boxed(0)
    assert issubclass(Int8, Box)
