"""The autoencoder against the published one (golden files), its latents, its memory savers, its operations counted."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.models.vae import (
    Vae,
    VaeConfig,
    decoder_flops,
    images_to_latents,
    latents_to_images,
    micro_batched,
    pack_latents,
    tiled,
    unpack_latents,
)
from egrpo_jax.weights.layout import import_tensors, published_shapes
from egrpo_jax.weights.published.vae import vae_layout
from tests.oracle.random_weights import random_tensors
from tests.oracle.vae import CASES, GOLDEN, inputs

SMALL = VaeConfig(block_out_channels=(4, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2)


def random_params(config, dtype=jnp.float32):
    """The parameters that the oracle has."""
    images = jax.ShapeDtypeStruct((1, config.stride, config.stride, 3), jnp.float32)
    template = jax.eval_shape(Vae(config).init, jax.random.key(0), images)["params"]
    layout = vae_layout(config, "diffusers")
    params = import_tensors(layout, random_tensors(published_shapes(layout, template)), template)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


@functools.cache
def coders(config, dtype=jnp.float32):
    """Jitted `encode_moments` and `decode`, in `dtype` throughout."""
    model, variables = Vae(config, dtype=dtype, param_dtype=dtype), {"params": random_params(config, dtype)}
    return [
        jax.jit(lambda x, method=method: model.apply(variables, x, method=method))
        for method in ("encode_moments", "decode")
    ]


def our_outputs(case, dtype=jnp.float32, seed=7):
    """The same names as `tests.oracle.vae.outputs`."""
    images, latents = inputs(case, seed)
    encode, decode = coders(case.config, dtype)
    mean, logvar = encode(images)
    return {"mean": mean, "logvar": logvar, "images": decode(latents)}


def golden(name):
    with np.load(GOLDEN) as file:
        return {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{name}/")}


def relative_error(got, expected):
    return np.abs(np.asarray(got) - expected).max() / np.abs(expected).max()


def rms(array):
    return float(np.sqrt(np.square(np.asarray(array)).mean()))


@pytest.mark.parametrize("name", CASES)
def test_parity_in_float32(name):
    expected = golden(name)
    for key, array in our_outputs(CASES[name]).items():
        assert array.shape == expected[key].shape
        assert relative_error(array, expected[key]) <= 1e-5, key


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_errs_no_more_than_the_published_model(name):
    expected = golden(name)
    for key, array in our_outputs(CASES[name], jnp.bfloat16).items():
        assert array.dtype == jnp.float32
        allowed = 1.2 * rms(expected[f"bf16_{key}"] - expected[key])
        assert 0 < rms(array - expected[key]) <= allowed, key


@pytest.mark.parametrize("name", CASES)
def test_tiles_as_the_published_model_has_them(name):
    case, expected = CASES[name], golden(name)
    images = tiled(coders(case.config)[1], case.tile)(inputs(case)[1])
    assert relative_error(images, expected["tiled_images"]) <= 1e-5
    assert relative_error(expected["images"], expected["tiled_images"]) > 0.01


def test_small_latents_are_not_tiled():
    latents = jnp.ones((1, 8, 4, 2))
    calls = []
    decode = lambda z: calls.append(z.shape) or z
    tiled(decode, 8)(latents)
    assert calls == [latents.shape]
    with pytest.raises(ValueError, match="multiple of 4"):
        tiled(decode, 6)


def test_tiles_of_a_local_decoder_join_without_a_seam():
    """Where every pixel depends on one latent alone, tiles agree where they overlap, and blending is the identity."""
    latents = jax.random.normal(jax.random.key(0), (2, 21, 14, 3))
    decode = lambda z: z.repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_allclose(tiled(decode, 8)(latents), decode(latents), rtol=1e-6)


def test_pack_order_by_hand():
    """Channel c, row i and column j of a patch: 4c + 2i + j; tokens row by row."""
    latents = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    tokens = np.asarray(pack_latents(latents))
    assert tokens.shape == (2, 6, 12)
    for (b, row, column, c), value in np.ndenumerate(latents):
        assert tokens[b, row // 2 * 3 + column // 2, 4 * c + 2 * (row % 2) + column % 2] == value
    np.testing.assert_array_equal(unpack_latents(tokens, (2, 3)), latents)
    with pytest.raises(ValueError, match="3x6"):
        pack_latents(latents[:, :3])


def test_latents_to_images_scales_and_clips():
    config = VaeConfig(latent_channels=3, scaling_factor=0.5, shift_factor=0.25)
    unscaled = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    tokens = pack_latents((unscaled - 0.25) * 0.5)
    images = latents_to_images(lambda z: z, tokens, (2, 3), config)
    np.testing.assert_allclose(images, np.clip((unscaled + 1) / 2, 0, 1), atol=1e-6)
    np.testing.assert_allclose(images_to_latents(lambda x: x, (unscaled + 1) / 2, config), tokens, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_micro_batches_change_nothing(size):
    decode = coders(SMALL)[1]
    latents = jax.random.normal(jax.random.key(0), (5, 4, 6, 2))
    np.testing.assert_allclose(jax.jit(micro_batched(decode, size))(latents), decode(latents), atol=1e-5)


def test_decoding_needs_the_decoder_alone():
    latents = jnp.ones((1, 2, 4, 2))
    model, params = Vae(SMALL), random_params(SMALL)
    assert set(params) == {"encoder", "decoder"}
    decode = functools.partial(model.apply, method="decode")
    assert jax.eval_shape(decode, {"params": {"decoder": params["decoder"]}}, latents).shape == (1, 4, 8, 3)
    fresh = jax.eval_shape(functools.partial(model.init, method="decode"), jax.random.key(0), latents)["params"]
    assert jax.tree.map(jnp.shape, fresh) == {"decoder": jax.tree.map(jnp.shape, params["decoder"])}


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="norm_num_groups 32 must divide"):
        VaeConfig(block_out_channels=(32, 48))
    with pytest.raises(ValueError, match="multiple of 2"):
        coders(SMALL)[0](jnp.ones((1, 5, 4, 3)))


def counted_flops(jaxpr):
    """Operations of the convolutions and matrix products of a jaxpr, from their shapes."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [variable.aval.shape for variable in equation.invars]
        if equation.primitive.name == "conv_general_dilated":
            features = equation.params["dimension_numbers"].rhs_spec[0]
            total += 2 * equation.outvars[0].aval.size * np.prod(shapes[1]) // shapes[1][features]
        elif equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            total += 2 * equation.outvars[0].aval.size * np.prod([shapes[0][axis] for axis in contracted])
        total += sum(counted_flops(inner) for inner in jax.extend.core.jaxprs_in_params(equation.params))
    return total


@pytest.mark.parametrize(
    ("config", "size", "teraflops"),
    [(VaeConfig(), (64, 64), 2.51), (VaeConfig(), (128, 128), 10.47), (SMALL, (3, 5), 0)],
)
def test_operations_of_the_decoder(config, size, teraflops):
    """Against the published size's known cost, and against a count from the shapes of the traced decoder."""
    flops = decoder_flops(config, *size)
    assert flops / 1e12 == pytest.approx(teraflops, abs=0.005)
    model = Vae(config)
    latents = jax.ShapeDtypeStruct((1, *size, config.latent_channels), jnp.float32)
    variables = jax.eval_shape(lambda z: model.init(jax.random.key(0), z, method="decode"), latents)
    traced = jax.make_jaxpr(lambda v, z: model.apply(v, z, method="decode"))(variables, latents)
    assert flops == counted_flops(traced.jaxpr)
