"""The FLUX.1 pipeline, and everything that can be wrong with its folder."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import flux_egrpo, flux_egrpo_fast, flux_lora, flux_schnell
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.common.offload import HOST
from egrpo_jax.data.embeddings import write_embeddings
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.pipelines import Export, ModelConfig, load_pipeline, load_writer
from egrpo_jax.pipelines.published import DANCE_GRPO, FLOW_GRPO, LoraOptions, PublishedOptions
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.weights.lora import save_lora
from egrpo_jax.weights.published.flux import flux_layout
from tests import tiny_flux
from tests.oracle.pipeline import PROMPTS, STEPS
from tests.pipelines.test_base import Arrays, num_bytes

MESH = make_mesh(MeshConfig())
OPTIONS = PublishedOptions(height=32, width=32, text_tokens=tiny_flux.TEXT_TOKENS, dtype="float32")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_flux.write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def broken(base, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(base, tmp_path / "broken")


def load(folder, **changes):
    options = PublishedOptions(**{**vars(OPTIONS), **changes})
    return load_pipeline(ModelConfig("published", str(folder), options))


def sample(pipeline):
    with jax.set_mesh(MESH):
        ((_, images),) = Sampler(pipeline, pipeline.sampling_times(STEPS), len(PROMPTS))(
            pipeline.load(MESH), PROMPTS, jax.random.key(0)
        )
        return images


def test_what_is_trained_and_how_it_is_stored(base):
    full = load(base, dtype="bfloat16")
    params = full.load(MESH)
    assert params["flow"]["final"]["kernel"].dtype == np.float32
    assert params["vae"].keys() == {"decoder"}
    adapters = load(base, dtype="bfloat16", lora=LoraOptions(rank=2))
    assert adapters.load(MESH)["flow"]["final"]["kernel"].dtype == jax.numpy.bfloat16
    assert (full.trainable, adapters.trainable) == ("^flow/", "^lora/")


@pytest.mark.parametrize(
    "module", ["transformer.transformer_blocks.1.attn.to_q", "lora_unet_double_blocks_1_img_attn_qkv"]
)
def test_adapters_are_found_by_either_name(base, tmp_path, module):
    rows = 3 * 32 if "qkv" in module else 32
    tensors = {f"{module}.lora_down.weight": np.ones((4, 32)), f"{module}.lora_up.weight": np.ones((rows, 4))}
    save_file(tensors, tmp_path / "x.safetensors")
    lora = load(base, lora=LoraOptions(rank=2), lora_weights=str(tmp_path / "x.safetensors")).load(MESH)["lora"]
    assert lora["double_blocks"]["image_qkv"]["to_q"]["a"].shape == (2, 32, 4)  # the file's rank
    assert len(lora["double_blocks"]["image_qkv"]) == rows // 32


def test_bfloat16_stays_near_float32(base):
    images = sample(load(base, dtype="bfloat16"))
    assert np.abs(images - sample(load(base))).mean() < 0.02


def test_text_encoders_that_rest_on_the_host_encode_alike(base):
    resting, usual = load(base, offload_encoders=True), load(base)
    before = {id(array) for array in jax.live_arrays()}
    with jax.set_mesh(MESH):
        found, expected = resting.encode(["a cat"]), usual.encode(["a cat"])
    kinds = [array.sharding.memory_kind for array in jax.live_arrays() if id(array) not in before and array.size > 500]
    assert kinds.count(HOST) == len(kinds) / 2 >= 1
    chex.assert_trees_all_equal(found, expected)
    assert resting.encoder_params == {}


def test_time_can_be_cut_to_thousandths(base):
    exact, cut = load(base), load(base, truncate_time=True)
    params, latents = exact.load(MESH), np.ones((1, 4, 16), np.float32)
    with jax.set_mesh(MESH):
        text = exact.encode(["a cat"])

    def at(pipeline):
        velocity = jax.jit(pipeline.velocity)
        return lambda time: np.asarray(velocity(params, latents, np.float32([time]), text))

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
    "another class": (
        lambda folder: change_json(folder / "transformer/config.json", _class_name="SD2Transformer2DModel"),
        r"config\.json: _class_name is \"SD2Transformer2DModel\"; must be FluxTransformer2DModel",
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
        load(broken).load(MESH)
    assert "\n" not in str(error.value)
    assert str(broken) in str(error.value)


def test_damaged_text_encoders_come_out_before_anything_is_encoded(broken):
    (broken / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_2/tokenizer\.json is missing"), jax.set_mesh(MESH):
        load(broken).encode(["a cat"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 40}, r"config\.height: found 40, expected a multiple of 16 from 16 to 16384"),
        ({"decode_tile": 6}, r"config\.decode_tile: found 6"),
        ({"text_tokens": 0}, r"config\.text_tokens: found 0"),
        ({"lora_weights": "x"}, r"config\.lora_weights: found 'x', expected lora to be set too"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(ConfigError, match=message):
        PublishedOptions(**changes)


def test_things_that_are_not_there(base):
    with pytest.raises(UserError, match=r"config\.model\.published\.transformer: found 'nowhere'"):
        load(base, transformer="nowhere")
    with pytest.raises(UserError, match="nowhere does not exist"):
        load("nowhere")
    with pytest.raises(UserError, match=r"settings\.json: .*expected a folder of embeddings"):
        load(base, embeddings="nowhere")
    for backend, device in (("cudnn", "an NVIDIA GPU"), ("splash", "a TPU")):
        found = rf"config\.model\.published\.attention: found '{backend}'"
        message = rf"{found}, expected 'auto' or 'xla', or for '{backend}' {device}"
        with pytest.raises(ConfigError, match=message):
            load(base, attention=backend)
    with pytest.raises(ConfigError, match=r"config\.model\.path: found None"):
        load_pipeline(ModelConfig("published"))


@pytest.mark.parametrize(
    ("config", "rewards"),
    [
        (flux_egrpo.get_config(), {"hpsv2.1"}),
        (flux_egrpo.get_config("hps,clip"), {"hpsv2.1", "clip_score"}),
        (flux_lora.get_config(), {"hpsv2.1"}),
        (flux_lora.get_config("dance_grpo"), {"hpsv2.1"}),
        (flux_schnell.get_config(), {"hpsv2.1"}),
        (flux_egrpo_fast.get_config(), {"hpsv2.1"}),
    ],
)
def test_the_configs_of_flux(config, rewards):
    read = from_config_dict(TrainConfig, config)
    assert set(read.rewards.train) == rewards
    assert not rewards & set(read.rewards.heldout)
    assert read.model.name == "published"
    assert (read.model.published.lora is None) == read.name.startswith("flux_egrpo")


def test_unknown_rewards_of_the_paper():
    with pytest.raises(ValueError, match=r"has the rewards \['clip', 'hps'\], found 'hps,x'"):
        flux_egrpo.get_config("hps,x")


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=2)])
def test_parameters_are_held_once_and_as_promised(base, lora):
    pipeline = load(base, dtype="bfloat16", lora=lora)
    with Arrays() as arrays:
        params = pipeline.load(MESH)
    assert arrays.num_bytes == num_bytes(pipeline.abstract_params)
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    assert described == pipeline.abstract(MESH)


def test_a_description_needs_no_weights(broken):
    for file in broken.rglob("*.safetensors"):
        file.unlink()
    with Arrays() as arrays:
        pipeline = load(broken, lora=LoraOptions(rank=2))
    assert arrays.num_bytes == 0
    assert pipeline.abstract_params.keys() == {"flow", "vae", "lora"}


def test_what_a_run_has_trained_is_not_read_again(broken):
    (broken / WEIGHTS).unlink()
    frozen = load(broken).load_frozen(MESH)
    assert jax.tree.leaves(frozen["flow"]) == []
    assert jax.tree.leaves(frozen["vae"])


def test_fresh_adapters_are_not_made_for_a_run_that_has_its_own(base, monkeypatch):
    pipeline = load(base, lora=LoraOptions(rank=2))
    monkeypatch.setattr("egrpo_jax.pipelines.published.loading.init_lora", None)
    frozen = pipeline.load_frozen(MESH)
    assert jax.tree.leaves(frozen["lora"]) == []
    assert jax.tree.leaves(frozen["flow"])


def test_adapters_of_a_file_have_its_rank(base, tmp_path):
    options = {"lora": LoraOptions(rank=2, targets=("image_out$",))}
    params = load(base, **options).load(MESH)
    ones = jax.tree.map(jax.numpy.ones_like, params["lora"])
    file = tmp_path / "adapters.safetensors"
    save_lora(file, ones, 2.0, flux_layout(tiny_flux.flux_config(), "diffusers"))
    pipeline = load(base, lora=LoraOptions(rank=64, alpha=128.0), lora_weights=str(file))
    assert jax.tree.structure(pipeline.abstract_params["lora"]) == jax.tree.structure(ones)
    np.testing.assert_allclose(pipeline.load(MESH)["lora"]["double_blocks"]["image_out"]["a"], 1)


def test_text_encoders_need_a_mesh(base):
    with pytest.raises(ValueError, match="no mesh to load text encoders on"):
        load(base).encode(["a cat"])


@pytest.mark.parametrize(("adapters", "expected"), [("flow_grpo", FLOW_GRPO), ("dance_grpo", DANCE_GRPO)])
def test_the_adapters_of_a_config(adapters, expected):
    assert from_config_dict(TrainConfig, flux_lora.get_config(adapters)).model.published.lora == expected
    with pytest.raises(ValueError, match=r"has the adapters \['dance_grpo', 'flow_grpo'\], found 'grpo'"):
        flux_lora.get_config("grpo")


@pytest.mark.parametrize("guidance", [True, False])
def test_what_images_depend_on_is_recorded(tmp_path, guidance):
    folder = tiny_flux.write_pipeline(tmp_path, guidance=guidance)
    about = load(folder, guidance=4.5, transformer=str(folder / "transformer")).about
    expected = {"transformer": str(folder / "transformer"), "int8_base": None, "lora_weights": None}
    assert about == expected | ({"guidance": 4.5} if guidance else {})


def test_embeddings_of_another_length_name_the_key(base, tmp_path):
    arrays = {"text": np.zeros((1, 5, 24), "f"), "pooled": np.zeros((1, 20), "f")}
    settings = {"family": "FLUX.1", "text_tokens": 5, "text": [5, 24], "pooled": [20]}
    write_embeddings(tmp_path, ["a cat"], lambda _: arrays, settings, 1, 1)
    expected = r"config\.model\.published\.embeddings: found .*'text_tokens': 12.*'text_tokens': 5"
    with pytest.raises(ConfigError, match=expected):
        load(base, embeddings=str(tmp_path))


def export(out, **changes):
    return Export(**{"out": out, "dtype": "float32", "copy": False, "of_run": True} | changes)


@pytest.mark.parametrize("form", ["diffusers", "pipeline", "orbax"])
def test_a_folder_that_exists_comes_out_before_weights_are_read(broken, form):
    (broken / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"vae exists; name a new folder"):
        load_writer(ModelConfig("published", str(broken), OPTIONS), form, export(broken / "vae"))
    assert load_writer(ModelConfig("published", str(broken), OPTIONS), form, export(broken / "new")) is not None
    assert not (broken / "new").exists()


def test_peft_needs_adapters_of_a_run(base, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.model\.published\.lora: found None, expected adapters"):
        load_writer(ModelConfig("published", str(base), OPTIONS), "peft", export(tmp_path))
    adapters = ModelConfig("published", str(base), dataclasses.replace(OPTIONS, lora=LoraOptions()))
    with pytest.raises(UserError, match="peft is for the adapters of a training run"):
        load_writer(adapters, "peft", export(tmp_path, of_run=False))


def test_adapters_that_are_there_already_are_not_replaced(base, tmp_path):
    (tmp_path / "mine.safetensors").write_bytes(b"hours of training")
    adapters = ModelConfig("published", str(base), dataclasses.replace(OPTIONS, lora=LoraOptions(rank=2)))
    with pytest.raises(UserError, match=r"mine\.safetensors exists; name a new one"):
        load_writer(adapters, "peft", export(tmp_path / "mine.safetensors", of_run=True))


@pytest.mark.parametrize("copy", [True, False])
def test_a_whole_pipeline_is_given_back(base, tmp_path, copy):
    config = ModelConfig("published", str(base), OPTIONS)
    params = load(base).load(MESH)
    load_writer(config, "pipeline", export(tmp_path / "out", copy=copy))(params)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in base.iterdir()}
    assert (tmp_path / "out" / "vae").is_symlink() != copy
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out").load(MESH), params)
