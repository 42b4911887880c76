"""The decoder against the published one (golden files), its latents, its memory savers, its operations counted."""

import dataclasses
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
    latents_to_images,
    micro_batched,
    tiled,
    unpack_latents,
)
from egrpo_jax.weights.layout import published_shapes
from egrpo_jax.weights.published.vae import vae_layout
from tests.layouts import import_tensors
from tests.oracle.random_weights import random_tensors
from tests.oracle.vae import CASES, FLUX2, GOLDEN, inputs, tokens

SMALL = VaeConfig(block_out_channels=(4, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2)


def decoder_shapes(config):
    """The parameter tree, as shapes."""
    latents = jax.ShapeDtypeStruct((1, 1, 1, config.latent_channels), jnp.float32)
    return jax.eval_shape(functools.partial(Vae(config).init, method="decode"), jax.random.key(0), latents)["params"]


def random_params(config, dtype=jnp.float32):
    """The parameters that the oracle has."""
    template = decoder_shapes(config)
    layout = vae_layout(config, "diffusers")
    params = import_tensors(layout, random_tensors(published_shapes(layout, template)), template)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)


@functools.cache
def decoder(config, dtype=jnp.float32):
    """Jitted `decode`, in `dtype` throughout."""
    model, variables = Vae(config, dtype=dtype, param_dtype=dtype), {"params": random_params(config, dtype)}
    return jax.jit(lambda latents: model.apply(variables, latents, method="decode"))


def our_outputs(case, dtype=jnp.float32, seed=7):
    """The same names as `tests.oracle.vae.outputs`."""
    decode = decoder(case.config, dtype)
    images = {"images": decode(inputs(case, seed))}
    if case.config.batch_norm_eps is not None:
        variables = {"params": random_params(case.config, dtype)}
        latents = Vae(case.config, dtype, dtype).apply(variables, tokens(case, seed), case.grid, method="unpack")
        images["token_images"] = latents_to_images(decode, latents)
    return images


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
    images = tiled(decoder(case.config), case.tile)(inputs(case))
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


def test_order_of_tokens_by_hand():
    """Channel c, row i and column j of a patch: 4c + 2i + j; tokens row by row."""
    tokens = np.arange(2 * 6 * 12, dtype=np.float32).reshape(2, 6, 12)
    latents = np.asarray(unpack_latents(tokens, (2, 3)))
    assert latents.shape == (2, 4, 6, 3)
    for (b, row, column, c), value in np.ndenumerate(latents):
        assert tokens[b, row // 2 * 3 + column // 2, 4 * c + 2 * (row % 2) + column % 2] == value
    with pytest.raises(AssertionError):
        unpack_latents(tokens, (2, 2))


def test_latents_to_images_clips():
    latents = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    np.testing.assert_allclose(latents_to_images(lambda z: z, latents), np.clip((latents + 1) / 2, 0, 1), atol=1e-6)


def test_two_numbers_scale_latents():
    config = VaeConfig(latent_channels=3, scaling_factor=0.5, shift_factor=0.25)
    packed = jax.random.normal(jax.random.key(0), (2, 6, 12))
    latents = Vae(config).apply({}, packed, (2, 3), method="unpack")
    np.testing.assert_allclose(latents, unpack_latents(packed, (2, 3)) / 0.5 + 0.25, atol=1e-6)


def test_statistics_scale_the_channels_of_tokens():
    """Each place of a patch has its own; the variance, as small as epsilon or even zero, is summed with it."""
    config = dataclasses.replace(FLUX2, latent_channels=1, batch_norm_eps=1e-4)
    params = {"latent_mean": jnp.array([0.0, 1, 2, 3]), "latent_variance": jnp.array([0.0, 3e-4, 1, 9])}
    packed = np.ones((1, 1, 4), np.float32)
    latents = Vae(config).apply({"params": params}, packed, (1, 1), method="unpack")
    np.testing.assert_allclose(latents[0, :, :, 0], [[0.01, 1.02], [3.00005, 6.0000167]], rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_micro_batches_change_nothing(size):
    decode = decoder(SMALL)
    latents = jax.random.normal(jax.random.key(0), (5, 4, 6, 2))
    np.testing.assert_allclose(jax.jit(micro_batched(decode, size))(latents), decode(latents), atol=1e-5)


SMALL_DECODER = dataclasses.replace(FLUX2, block_out_channels=(96, 192, 384, 384))


@pytest.mark.parametrize(
    ("config", "count"),
    [(VaeConfig(), 49_545_475), (FLUX2, 49_620_515), (SMALL_DECODER, 27_947_491)],
    ids=["flux", "flux2", "flux2_small_decoder"],
)
def test_published_parameter_counts(config, count):
    """FLUX.2's counted with the statistics of its latents."""
    assert sum(leaf.size for leaf in jax.tree.leaves(decoder_shapes(config))) == count


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="norm_num_groups 32 must divide"):
        VaeConfig(block_out_channels=(32, 48))
    with pytest.raises(AssertionError):
        decoder(SMALL)(jnp.ones((1, 5, 4, 3)))


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
    [
        (VaeConfig(), (64, 64), 2.51),
        (VaeConfig(), (128, 128), 10.47),
        (FLUX2, (64, 64), 2.52),
        (FLUX2, (128, 128), 10.47),
        (SMALL_DECODER, (64, 64), 1.42),
        (SMALL_DECODER, (128, 128), 6.00),
        (SMALL, (3, 5), 0),
        (CASES["flux2"].config, (3, 5), 0),
    ],
)
def test_operations_of_the_decoder(config, size, teraflops):
    """Against the published size's known cost, and against a count from the shapes of the traced decoder."""
    flops = decoder_flops(config, *size)
    assert flops / 1e12 == pytest.approx(teraflops, abs=0.005)
    latents = jax.ShapeDtypeStruct((1, *size, config.latent_channels), jnp.float32)
    decode = lambda params, z: Vae(config).apply({"params": params}, z, method="decode")
    traced = jax.make_jaxpr(decode)(decoder_shapes(config), latents)
    assert flops == counted_flops(traced.jaxpr)
