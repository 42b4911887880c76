"""The FLUX.1 pipeline against diffusers' images, and everything that can be wrong with its folder."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import flux_egrpo, flux_lora, flux_schnell
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.models.lora import LoraConfig
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.pipelines import ModelConfig, load_pipeline
from egrpo_jax.pipelines.flux.pipeline import FluxOptions
from egrpo_jax.training.config import TrainConfig
from tests import tiny_flux
from tests.oracle.pipeline import GOLDEN, PROMPTS, STEPS

OPTIONS = FluxOptions(height=32, width=32, text_tokens=tiny_flux.TEXT_TOKENS, dtype="float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_flux.write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def broken(base, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(base, tmp_path / "broken")


def load(folder, **changes):
    options = FluxOptions(**{**vars(OPTIONS), **changes})
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        return load_pipeline(ModelConfig("flux", str(folder), options), mesh)


def sample(pipeline):
    with jax.set_mesh(make_mesh(MeshConfig())):
        times = shifted_times(STEPS, pipeline.sampling_shift)
        return Sampler(pipeline, times, len(PROMPTS))(pipeline.params, PROMPTS, jax.random.key(0))


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_images_are_those_of_diffusers(tmp_path, name):
    folder = tiny_flux.write_pipeline(tmp_path / name, guidance=name == "dev")
    with np.load(GOLDEN) as golden:
        expected = golden[name]
    images = sample(load(folder))
    assert np.abs(images - expected).max() < 1e-4
    assert expected.std() > 0.1


def test_what_is_trained_and_how_it_is_stored(base):
    full = load(base, dtype="bfloat16")
    assert full.params["flow"]["final"]["kernel"].dtype == np.float32
    assert full.params["vae"].keys() == {"decoder"}
    adapters = load(base, dtype="bfloat16", lora=LoraConfig(rank=2))
    assert adapters.params["flow"]["final"]["kernel"].dtype == jax.numpy.bfloat16
    assert (full.trainable, adapters.trainable) == ("^flow/", "^lora/")


def test_bfloat16_stays_near_float32(base):
    images = sample(load(base, dtype="bfloat16"))
    assert np.abs(images - sample(load(base))).mean() < 0.02


def test_time_can_be_cut_to_thousandths(base):
    exact, cut = load(base), load(base, truncate_time=True)
    latents, text = np.ones((1, 4, 16), np.float32), exact.encode(["a cat"])

    def at(pipeline):
        velocity = jax.jit(pipeline.velocity)
        return lambda time: np.asarray(velocity(pipeline.params, latents, np.float32([time]), text))

    exactly, roughly = at(exact), at(cut)
    np.testing.assert_array_equal(roughly(0.7417), roughly(0.7411))
    moved = np.abs(exactly(0.7417) - exactly(0.741)).max()
    # 741 / 1000 may differ from 0.741 by a rounding error, times 1000 in the sinusoid.
    assert np.abs(roughly(0.7417) - exactly(0.741)).max() < 0.02 * moved


def change_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "remove"}))


def change_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def cut_off(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def an_integer(tensors):
    tensors["x_embedder.bias"] = np.zeros(32, np.int32)


DAMAGE = {
    "truncated": (cut_off, r"diffusion_pytorch_model\.safetensors is damaged: .*download it again"),
    "missing": (
        lambda folder: change_tensors(folder / WEIGHTS, lambda t: t.pop("norm_out.linear.bias")),
        r"1 missing \(norm_out\.linear\.bias\)",
    ),
    "mis-shaped": (
        lambda folder: change_tensors(folder / WEIGHTS, lambda t: t.update({"x_embedder.bias": np.zeros(7, "f")})),
        r"1 of another shape \(x_embedder\.bias \[7\] instead of \[32\]\)",
    ),
    "unexpected": (
        lambda folder: change_tensors(folder / WEIGHTS, lambda t: t.update({"extra.bias": np.zeros(7, "f")})),
        r"1 unexpected \(extra\.bias\)",
    ),
    "dtype": (
        lambda folder: change_tensors(folder / WEIGHTS, an_integer),
        r"1 not floating-point \(x_embedder\.bias int32\)",
    ),
    "sd3": (
        lambda folder: change_json(folder / "transformer/config.json", _class_name="SD3Transformer2DModel"),
        r"config\.json is of a SD3Transformer2DModel; must be of a FluxTransformer2DModel",
    ),
    "unknown key": (
        lambda folder: change_json(folder / "transformer/config.json", flash_heads=3),
        r"config\.json: unknown flash_heads; this kind of model has patch_size",
    ),
    "vae of another kind": (
        lambda folder: change_json(folder / "vae/config.json", use_quant_conv=True),
        r"vae/config\.json: use_quant_conv is true; must be false",
    ),
    "no transformer": (
        lambda folder: shutil.rmtree(folder / "transformer"),
        r"transformer/config\.json is missing",
    ),
    "no scheduler": (
        lambda folder: shutil.rmtree(folder / "scheduler"),
        r"scheduler_config\.json is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(broken, name):
    damage, message = DAMAGE[name]
    damage(broken)
    with pytest.raises(UserError, match=message) as error:
        load(broken)
    assert "\n" not in str(error.value)
    assert str(broken) in str(error.value)


def test_damaged_text_encoders_come_out_before_anything_is_encoded(broken):
    (broken / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_2/tokenizer\.json is missing"):
        load(broken).encode(["a cat"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 40}, r"config\.height: found 40, expected a positive multiple of 16"),
        ({"decode_tile": 6}, r"config\.decode_tile: found 6"),
        ({"text_tokens": 0}, r"config\.text_tokens: found 0"),
        ({"lora_weights": "x"}, r"config\.lora_weights: found 'x', expected model\.flux\.lora"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(ConfigError, match=message):
        FluxOptions(**changes)


def test_things_that_are_not_there(base):
    with pytest.raises(UserError, match=r"config\.model\.flux\.transformer: found 'nowhere'"):
        load(base, transformer="nowhere")
    with pytest.raises(UserError, match="nowhere does not exist"):
        load("nowhere")
    with pytest.raises(UserError, match=r"settings\.json: .*expected a folder of embeddings"):
        load(base, embeddings="nowhere")
    mesh = make_mesh(MeshConfig())
    with pytest.raises(ConfigError, match=r"config\.model\.path: found None"):
        load_pipeline(ModelConfig("flux"), mesh)


@pytest.mark.parametrize(
    ("config", "rewards"),
    [
        (flux_egrpo.get_config(), {"hpsv2.1"}),
        (flux_egrpo.get_config("hps,clip"), {"hpsv2.1", "clip_score"}),
        (flux_lora.get_config(), {"hpsv2.1"}),
        (flux_schnell.get_config(), {"hpsv2.1"}),
    ],
)
def test_the_configs_of_flux(config, rewards):
    read = from_config_dict(TrainConfig, config)
    assert set(read.rewards.train) == rewards
    assert not rewards & set(read.rewards.heldout)
    assert read.model.name == "flux"
    assert (read.model.flux.lora is None) == (read.name == "flux_egrpo")


def test_unknown_rewards_of_the_paper():
    with pytest.raises(ValueError, match=r"has the rewards \['clip', 'hps'\], found 'hps,x'"):
        flux_egrpo.get_config("hps,x")
