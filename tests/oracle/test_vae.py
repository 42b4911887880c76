"""The autoencoder against freshly built PyTorch modules: outputs, gradients, file formats."""

import collections
import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from egrpo_jax.models.vae import Vae  # noqa: E402
from egrpo_jax.weights.configs import Published  # noqa: E402
from egrpo_jax.weights.layout import export_tensors  # noqa: E402
from egrpo_jax.weights.published.vae import FLUX2_KEYS, IGNORED, KEYS, config_from_diffusers, vae_layout  # noqa: E402
from tests.models.test_vae import golden, our_outputs, random_params, relative_error, rms  # noqa: E402
from tests.oracle.vae import CASES, cases, inputs, outputs, published_model, to_numpy, to_torch  # noqa: E402


def test_golden_files_are_what_the_published_model_makes():
    for name, arrays in cases().items():
        expected = golden(name)
        assert expected.keys() == arrays.keys()
        for key, array in arrays.items():
            tolerance = 2e-2 if key.startswith("bf16") else 1e-5
            assert relative_error(array, expected[key]) <= tolerance, (name, key)


@pytest.mark.parametrize("name", CASES)
def test_other_inputs_in_both_precisions(name):
    """Ours errs no more in bfloat16 than the published model does, over several inputs."""
    case = CASES[name]
    published, halved = published_model(case), published_model(case).to(torch.bfloat16)
    errors = collections.defaultdict(list)
    for seed in range(4):
        expected = outputs(case, published, seed)
        for key, array in our_outputs(case, seed=seed).items():
            assert relative_error(array, expected[key]) <= 1e-5, key
        for source, arrays in (
            ("ours", our_outputs(case, jnp.bfloat16, seed)),
            ("theirs", outputs(case, halved, seed)),
        ):
            for key, array in arrays.items():
                errors[source, key].append(rms(array - expected[key]))
    for key in expected:
        assert rms(errors["ours", key]) <= 1.2 * rms(errors["theirs", key]), key


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_decoder(name):
    """By the latents and by every parameter, of the product of the image with fixed noise.

    Some are zero but for rounding, such as that of the key's bias: these are held against the size of the others.
    """
    case = CASES[name]
    latents = inputs(case)
    published, model = published_model(case), Vae(case.config)
    places = to_torch(latents).requires_grad_()
    images = published.decode(places).sample
    noise = np.random.default_rng(8).standard_normal(to_numpy(images).shape).astype(np.float32)
    (images * to_torch(noise)).sum().backward()

    def product(params, latents):
        return (model.apply({"params": params}, latents, method="decode") * noise).sum()

    by_params, by_latents = jax.jit(jax.grad(product, (0, 1)))(random_params(case.config), latents)
    assert relative_error(by_latents, to_numpy(places.grad)) <= 1e-5
    used = {key: parameter for key, parameter in published.named_parameters() if parameter.grad is not None}
    expected = {key: parameter.grad.numpy() for key, parameter in used.items()}
    ours = dict(export_tensors(vae_layout(case.config, "diffusers"), by_params))
    assert {key for key in ours if not key.startswith("bn.")} == expected.keys()  # decoding has no use for statistics
    scale = rms(np.concatenate([array.ravel() for array in expected.values()]))
    for key, array in expected.items():
        np.testing.assert_allclose(
            ours[key], array, rtol=1e-5, atol=1e-5 * max(scale, np.abs(array).max()), err_msg=key
        )


@pytest.mark.parametrize("name", CASES)
def test_diffusers_reads_our_files_of_both_formats(name):
    """Its own conversion of the layout of Black Forest Labs gives the tensors that we write for diffusers."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    case = CASES[name]
    published = published_model(case)
    params = random_params(case.config)
    tensors = dict(export_tensors(vae_layout(case.config, "diffusers"), params))
    unread = re.compile("|".join(IGNORED))
    state = {key: tensor.numpy() for key, tensor in published.state_dict().items() if not unread.fullmatch(key)}
    assert tensors.keys() == state.keys()
    bfl = {key: torch.from_numpy(array.copy()) for key, array in export_tensors(vae_layout(case.config, "bfl"), params)}
    # It knows FLUX.1's files alone: FLUX.2's have two names more.
    bfl = {key.replace("decoder.post_quant_conv", "post_quant_conv"): tensor for key, tensor in bfl.items()}
    statistics = {key: tensor for key, tensor in bfl.items() if key.startswith("bn.")}
    converted = convert_ldm_vae_checkpoint(bfl, published.config) | statistics
    assert converted.keys() == state.keys()
    for key, array in state.items():
        np.testing.assert_array_equal(tensors[key], array)
        np.testing.assert_array_equal(converted[key], array)


def test_keys_of_the_config():
    """Their names and defaults are those of the published classes, and what these write is read as it was meant."""
    from diffusers import AutoencoderKL, AutoencoderKLFlux2

    for published, keys in ((AutoencoderKL, KEYS), (AutoencoderKLFlux2, FLUX2_KEYS)):
        arguments = inspect.signature(published.__init__).parameters
        defaults = {name: argument.default for name, argument in arguments.items() if name != "self"}
        assert defaults == {name: key.default for name, key in keys.items() if name in defaults}
        # A key that published files of FLUX.2 have, and its class has no argument for.
        assert keys.keys() - defaults.keys() <= {"force_upcast"}
    for case in CASES.values():
        written = json.loads(published_model(case).to_json_string())
        assert config_from_diffusers(Published(written)) == case.config
