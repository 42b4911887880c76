"""Adapters to a FLUX.1 whose frozen kernels are stored as int8, on a pipeline in miniature."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.parallel.mesh import EXACT, MeshConfig, make_mesh
from egrpo_jax.pipelines import Export, ModelConfig, exact_model, lighter_options, load_pipeline, load_writer
from egrpo_jax.pipelines import sketch_pipeline as sketch
from egrpo_jax.pipelines.families import FLUX
from egrpo_jax.pipelines.families.flux import FluxText
from egrpo_jax.pipelines.published import DANCE_GRPO, LoraOptions, PublishedOptions
from egrpo_jax.weights.published.flux import flux_layout
from tests import tiny_flux
from tests.layouts import import_tensors
from tests.pipelines.test_base import Arrays, num_bytes

MESH = make_mesh(MeshConfig())
OPTIONS = PublishedOptions(
    height=32, width=32, text_tokens=tiny_flux.TEXT_TOKENS, dtype="float32", lora=LoraOptions(rank=2), int8_base=True
)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_flux.write_pipeline(tmp_path_factory.mktemp("pipeline"))


def model(folder, **changes):
    return ModelConfig("published", str(folder), dataclasses.replace(OPTIONS, **changes))


def load(folder, **changes):
    return load_pipeline(model(folder, **changes))


def restated(weights):
    """The integers and the scales of `weights [..., in, out]`, in float32 as the loader has it."""
    scale = np.abs(weights).max(-2, keepdims=True) / np.float32(127)
    return np.rint(weights / scale), scale


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_every_published_tensor_is_rounded_as_it_is_read(base, tmp_path, stored):
    tensors = {name: tensor.astype(stored) for name, tensor in load_file(base / WEIGHTS).items()}
    save_file(tensors, tmp_path / "other.safetensors")
    pipeline = load(base, dtype="bfloat16", transformer=str(tmp_path / "other.safetensors"))
    with Arrays() as arrays:
        params = pipeline.load(MESH)
    assert arrays.num_bytes == num_bytes(pipeline.abstract_params)
    flow = flatten_dict(params["flow"], sep="/")
    config = tiny_flux.flux_config()
    published = import_tensors(flux_layout(config, "diffusers"), tensors, FLUX.shapes(config))
    for path, weights in flatten_dict(published, sep="/").items():
        if "blocks/" in path and path.endswith("/kernel"):
            values, scale = restated(weights.astype(np.float32))
            np.testing.assert_array_equal(flow[path].values, values, err_msg=path)
            np.testing.assert_array_equal(flow[path].scale, scale, err_msg=path)
        else:
            assert flow[path].dtype == jnp.bfloat16
            np.testing.assert_array_equal(flow[path], weights.astype(jnp.bfloat16), err_msg=path)


def test_a_weight_that_is_not_finite_is_named(base, tmp_path):
    tensors = load_file(base / WEIGHTS)
    tensors["single_transformer_blocks.1.proj_out.weight"][3, 2] = np.nan
    save_file(tensors, tmp_path / "bad.safetensors")
    message = r"bad\.safetensors: a weight of single_blocks/out/kernel is not finite, which int8 cannot store"
    with pytest.raises(UserError, match=message):
        load(base, transformer=str(tmp_path / "bad.safetensors")).load(MESH)


def read_before(params):
    """`params` with the kernels of the base read from int8 beforehand."""
    return params | {"flow": nn.meta.unbox(params["flow"])}


def inputs(batch=2):
    keys = jax.random.split(jax.random.key(1), 3)
    text = jax.random.normal(keys[0], (batch, tiny_flux.TEXT_TOKENS, 24))
    latents = jax.random.normal(keys[2], (batch, 4, 16))
    return latents, jnp.array([0.9, 0.3]), FluxText(text, jax.random.normal(keys[1], (batch, 20)))


def random_adapters(params):
    leaves, tree = jax.tree.flatten(params["lora"])
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return params | {"lora": tree.unflatten(noise)}


@pytest.mark.parametrize(("dtype", "remat"), [("float32", "none"), ("bfloat16", "blocks")])
def test_velocity_and_gradient_are_those_of_the_rounded_weights(base, dtype, remat):
    pipeline = load(base, dtype=dtype, remat=remat)
    params = random_adapters(pipeline.load(MESH))

    def loss(lora, frozen):
        velocity = pipeline.velocity(frozen | {"lora": lora}, *inputs())
        return jnp.square(velocity).mean(), velocity

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=EXACT)
    ((_, velocity), grads), ((_, expected), expected_grads) = (
        run(each["lora"], each) for each in (params, read_before(params))
    )
    np.testing.assert_allclose(velocity, expected, rtol=1e-6, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, expected_grads)
    exact = load(base, dtype=dtype, int8_base=False)
    other = exact.velocity(exact.load(MESH) | {"lora": params["lora"]}, *inputs())
    assert 1e-4 < np.abs(velocity - other).max() / np.abs(other).max() < 0.1  # and not those of the published ones


def test_the_base_takes_half_of_bfloat16():
    path = "black-forest-labs/FLUX.1-dev"
    bytes_of = lambda **changes: num_bytes(
        sketch(model(path, dtype="bfloat16", embeddings="made before", **changes)).abstract_params["flow"]
    )
    assert bytes_of(int8_base=False) == 2 * 11_901_408_320
    assert bytes_of() == pytest.approx(11.98e9, rel=1e-3)


def test_an_orbax_checkpoint_is_refused_in_a_line(base, tmp_path):
    (tmp_path / "orbax").mkdir()
    (tmp_path / "config.json").write_text((base / "transformer" / "config.json").read_text())
    message = r"^config\.model\.published\.int8_base: found True, expected a transformer in safetensors, not an Orbax"
    for describe in (load_pipeline, sketch):
        with pytest.raises(ConfigError, match=message):
            describe(model(base, transformer=str(tmp_path)))
    assert load(base, transformer=str(tmp_path), int8_base=False).abstract_params


def test_weights_are_given_back_from_the_published_ones(base, tmp_path):
    config = exact_model(model(base))
    assert config == model(base, int8_base=False)
    assert exact_model(ModelConfig("emoji")) == ModelConfig("emoji")
    assert exact_model(ModelConfig("tests.toy:pipeline")) == ModelConfig("tests.toy:pipeline")
    order = Export(tmp_path / "out", "float32", copy=False, of_run=True)
    load_writer(config, "diffusers", order)(load_pipeline(config).load(MESH))  # fresh adapters change nothing
    published, given = (load_file(file) for file in (base / WEIGHTS, *(tmp_path / "out").glob("*.safetensors")))
    jax.tree.map(np.testing.assert_array_equal, given, published)


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (DANCE_GRPO, [{"decode_batch": 1}, {}, {"int8_base": True}]),
        (None, [{"decode_batch": 1}, {"lora": LoraOptions()}, {"lora": LoraOptions(), "int8_base": True}]),
    ],
)
def test_it_is_proposed_where_memory_is_short(lora, expected):
    found = lighter_options(model("x", lora=lora, int8_base=False))
    assert found == [{f"model.published.{name}": value for name, value in options.items()} for options in expected]
