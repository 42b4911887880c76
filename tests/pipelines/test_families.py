"""Every family of published models, on a pipeline in miniature: diffusers' images, what is loaded and stored."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import flux2_klein_lora, sd35_egrpo, sd35_lora, z_image_lora
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.data.embeddings import write_embeddings
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.models.lora import adapted_layers, merge_lora
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.pipelines import ModelConfig, load_encoder, load_pipeline, sketch_pipeline
from egrpo_jax.pipelines.families import FAMILIES, family_of, released
from egrpo_jax.pipelines.published import LoraOptions, PublishedOptions
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.weights.configs import read_config
from egrpo_jax.weights.layout import export_tensors, published_shapes
from tests import tiny_flux, tiny_qwen
from tests.oracle.pipeline import FOLDERS, GOLDEN, PROMPTS, STEPS, Z_IMAGE_GUIDANCE, text_tokens
from tests.pipelines.test_base import Arrays, num_bytes

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
MESH = make_mesh(MeshConfig())
SIZE = tiny_flux.SIZE
OPTIONS = PublishedOptions(height=SIZE, width=SIZE, dtype="float32")
UNGUIDED = {"sd3_medium": 1.0, "flux2_base": 1.0, "z_image": 0.0}
"""The guidance with which those that are guided are not."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {name: write(root / name) for name, write in FOLDERS.items()}


def model(folder, **changes):
    """A config of the pipeline in `folder`, which is called as in `FOLDERS`."""
    published = {"text_tokens": text_tokens(folder.name)}
    if folder.name == "z_image":
        published["guidance"] = Z_IMAGE_GUIDANCE
    return ModelConfig("published", str(folder), dataclasses.replace(OPTIONS, **published | changes))


def images(pipeline, params=None, prompts=PROMPTS):
    with jax.set_mesh(MESH):
        sampler = Sampler(pipeline, pipeline.sampling_times(STEPS), len(prompts))
        ((_, made),) = sampler(pipeline.load(MESH) if params is None else params, prompts, jax.random.key(0))
        return made


@pytest.mark.parametrize("name", FOLDERS)
def test_images_are_those_of_diffusers(folders, name):
    with np.load(GOLDEN) as golden:
        expected = golden[name]
    assert np.abs(images(load_pipeline(model(folders[name]))) - expected).max() < 1e-4
    assert expected.std() > 0.1


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=2)])
@pytest.mark.parametrize("name", FOLDERS)
def test_parameters_are_held_once_and_as_promised(folders, name, lora):
    pipeline = load_pipeline(model(folders[name], dtype="bfloat16", lora=lora))
    with Arrays() as arrays:
        params = pipeline.load(MESH)
    texts = 0 if "negative" not in params else num_bytes(jax.eval_shape(lambda: params["negative"]))
    assert num_bytes(pipeline.abstract_params) <= arrays.num_bytes
    assert texts or arrays.num_bytes == num_bytes(pipeline.abstract_params)  # else text encoders stay, too
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    assert described == pipeline.abstract(MESH)


@pytest.mark.parametrize("name", FOLDERS)
def test_stored_embeddings_give_the_same_images(folders, name, tmp_path):
    config = model(folders[name])
    encoder = load_encoder(config)
    with jax.set_mesh(MESH):
        encode = lambda part: {key: np.asarray(array) for key, array in encoder(part)._asdict().items()}
        write_embeddings(tmp_path, [*encoder.always, *PROMPTS], encode, encoder.settings, 2, 2)
    stored = load_pipeline(model(folders[name], embeddings=str(tmp_path)))
    chex.assert_trees_all_close(images(stored), images(load_pipeline(config)), atol=1e-5)


@pytest.mark.parametrize("name", FOLDERS)
def test_adapters_by_the_usual_names_are_found(folders, name):
    pipeline = load_pipeline(model(folders[name], lora=LoraOptions(rank=2)))
    assert jax.tree.leaves(pipeline.abstract_params["lora"])
    assert pipeline.trainable == "^lora/"


@pytest.mark.parametrize("name", FOLDERS)
def test_every_preset_names_layers(folders, name):
    (family,) = (f for f in FAMILIES.values() if f.class_name == _class_name(folders[name]))
    for preset in family.presets:
        load_pipeline(model(folders[name], lora=LoraOptions((preset,), rank=2)))


def _class_name(folder):
    return json.loads((folder / "transformer" / "config.json").read_text())["_class_name"]


@pytest.mark.parametrize("name", UNGUIDED)
def test_guidance_is_two_passes_and_can_be_left_out(folders, name):
    guided, plain = load_pipeline(model(folders[name])), load_pipeline(model(folders[name], guidance=UNGUIDED[name]))
    assert (guided.passes, plain.passes) == (2, 1)
    assert guided.forward_flops == 2 * plain.forward_flops
    assert guided.training_flops == 2 * plain.training_flops
    assert "negative" not in plain.abstract_params
    assert np.abs(images(guided) - images(plain)).max() > 0.05


@pytest.mark.parametrize("name", UNGUIDED)
def test_guided_away_from_the_prompt_itself_is_not_guided(folders, name):
    prompts = ["a red cat"] * 2
    plain = images(load_pipeline(model(folders[name], guidance=UNGUIDED[name])), prompts=prompts)
    guided = images(load_pipeline(model(folders[name], guidance=9.0, negative="a red cat")), prompts=prompts)
    np.testing.assert_allclose(guided, plain, atol=1e-4)


@pytest.mark.parametrize("name", UNGUIDED)
def test_a_negative_prompt_that_is_not_stored(folders, name, tmp_path):
    encoder = load_encoder(model(folders[name]))
    with jax.set_mesh(MESH):
        encode = lambda part: {key: np.asarray(array) for key, array in encoder(part)._asdict().items()}
        write_embeddings(tmp_path, PROMPTS[:1], encode, encoder.settings, 1, 1)
    with pytest.raises(ConfigError, match=r"published\.embeddings: .* a folder with the negative prompt '': encode"):
        load_pipeline(model(folders[name], embeddings=str(tmp_path)))


def test_a_table_of_positions_is_not_trained(folders):
    pipeline = load_pipeline(model(folders["sd3_medium"]))
    frozen = pipeline.load_frozen(MESH)["flow"]
    assert {key for key, part in frozen.items() if jax.tree.leaves(part)} == {"positions"}


def test_more_places_than_there_are_positions(folders):
    with pytest.raises(ConfigError, match=r"published\.height: found 112, expected at most 96"):
        load_pipeline(model(folders["sd3_medium"], height=112))
    with pytest.raises(ConfigError, match=r"published\.text_tokens: found 97, expected at most 96"):
        load_pipeline(model(folders["z_image"], text_tokens=97))
    assert load_pipeline(model(folders["z_image"], text_tokens=96)).latents_shape == (4, 16)


@pytest.mark.parametrize(
    ("name", "family", "blocks"),
    [
        ("black-forest-labs/FLUX.1-dev", "FLUX.1", 19),
        ("stabilityai/stable-diffusion-3.5-medium", "SD3.5", 24),
        ("stabilityai/stable-diffusion-3.5-large", "SD3.5", 38),
        ("black-forest-labs/FLUX.2-klein-base-4B", "FLUX.2", 5),
        ("black-forest-labs/FLUX.2-klein-9B", "FLUX.2", 24),
        ("black-forest-labs/FLUX.2-dev", "FLUX.2", 48),
        ("Tongyi-MAI/Z-Image", "Z-Image", 30),
    ],
)
def test_published_models_are_known_by_their_names(name, family, blocks):
    found, sizes = released(name)
    assert found.name == family
    assert blocks in vars(sizes).values()
    pipeline = sketch_pipeline(ModelConfig("published", name, PublishedOptions(height=512, width=512, guidance=4.0)))
    assert pipeline.forward_flops > 1e12


@pytest.mark.parametrize(
    ("config", "adapters"),
    [
        (sd35_lora.get_config(), 18.8),
        (sd35_egrpo.get_config(), None),
        (sd35_egrpo.get_config("large"), None),
        (flux2_klein_lora.get_config(), 76.7),
        (z_image_lora.get_config(), 158.8),
    ],
)
def test_the_configs_of_the_families(config, adapters):
    """Millions of weights of the adapters that others train."""
    read = from_config_dict(TrainConfig, config)
    pipeline = sketch_pipeline(read.model)
    found = jax.tree.leaves(pipeline.abstract_params.get("lora", {}))
    assert pipeline.passes == 2
    assert sum(leaf.size for leaf in found) / 1e6 == pytest.approx(adapters or 0, abs=0.1)


def random_adapters(family, sizes, form, rank=3):
    """A and B of the modules, in a file of the format `form`, that the usual adapters are of."""
    lora = LoraOptions(rank=rank).adapters(family.presets)
    layers = set(adapted_layers(family.shapes(sizes), lora.targets))
    layout = family.formats[form].layout(sizes)
    shapes = published_shapes(layout, family.shapes(sizes))
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return {
        e.name.removesuffix(".weight"): (draw(rank, shapes[e.name][1]), draw(shapes[e.name][0], rank))
        for e in layout
        if {leaf.path.removesuffix("/kernel") for leaf in e.leaves} <= layers
    }


SPELLINGS = {
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "comfy": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
}
KINDS = [(name, "diffusers") for name in ("flux_dev", "sd3_medium", "flux2_base", "z_image")]
ORIGINALS = [("sd3_medium", "original"), ("flux2_base", "bfl"), ("z_image", "original")]
FILES = [
    *((*kind, spelling) for kind in KINDS for spelling in SPELLINGS),
    *((*kind, spelling) for kind in ORIGINALS for spelling in ("comfy", "kohya")),
]


@pytest.mark.parametrize(("name", "form", "spelling"), FILES)
def test_adapters_in_a_file_add_what_they_add_to_the_published_weights(folders, tmp_path, name, form, spelling):
    """W + alpha / r B A, in the file's own format: whatever is joined, swapped or permuted in it."""
    family = family_of(folders[name])
    sizes = family.read_sizes(read_config(folders[name] / "transformer", family.class_name))
    adapters, alpha = random_adapters(family, sizes, form), 1.5
    called = lambda module: module.replace(".", "_") if spelling == "kohya" else module
    spell = lambda part, module: SPELLINGS[spelling][part].format(called(module))
    tensors = {spell(part, module): pair[part] for module, pair in adapters.items() for part in (0, 1)}
    if spelling == "peft":
        settings = {"peft_type": "LORA", "r": 3, "lora_alpha": alpha, "target_modules": sorted(adapters)}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        alphas = {module: spell(0, module).rpartition(".lora_")[0] for module in adapters}
        tensors |= {f"{prefix}.alpha": np.array(alpha, np.float32) for prefix in alphas.values()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = model(folders[name], lora=LoraOptions(rank=7, alpha=2.0), lora_weights=str(tmp_path))
    params = load_pipeline(config).load(MESH)
    merged = merge_lora(params["flow"], params["lora"], 2.0 / 7)
    layout = family.formats[form].layout(sizes)
    before, after = (dict(export_tensors(layout, tree)) for tree in (params["flow"], merged))
    assert len(adapters) > 4
    for tensor, weights in before.items():
        a, b = adapters.get(tensor.removesuffix(".weight"), (np.zeros((1, 1)), np.zeros((1, 1))))
        added = alpha / 3 * b @ a if len(b) > 1 else 0.0
        np.testing.assert_allclose(after[tensor], weights + added, atol=1e-4, err_msg=tensor)


@pytest.mark.parametrize(("name", "form"), ORIGINALS)
def test_a_single_file_with_other_models_beside(folders, tmp_path, name, form):
    family = family_of(folders[name])
    sizes = family.read_sizes(read_config(folders[name] / "transformer", family.class_name))
    expected = load_pipeline(model(folders[name])).load(MESH)["flow"]
    tensors = dict(export_tensors(family.formats[form].layout(sizes), expected))
    tensors = {f"model.diffusion_model.{key}": np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
    save_file(
        tensors | {"first_stage_model.decoder.conv_in.bias": np.zeros(4, np.float32)}, tmp_path / "one.safetensors"
    )
    found = load_pipeline(model(folders[name], transformer=str(tmp_path / "one.safetensors"))).load(MESH)["flow"]
    chex.assert_trees_all_equal(found, expected)


def test_a_guidance_that_no_file_tells(folders):
    expected = r"published\.guidance: found None, expected a scale, or 0 for a model that is distilled to none"
    with pytest.raises(ConfigError, match=expected):
        load_pipeline(model(folders["z_image"], guidance=None))


def test_a_distilled_model_is_not_guided(folders):
    assert load_pipeline(model(folders["flux2_distilled"])).passes == 1
    assert load_pipeline(model(folders["flux2_base"])).passes == 2


def test_the_text_of_flux2_dev_must_be_stored(folders, tmp_path):
    folder = shutil.copytree(folders["flux2_base"], tmp_path / "flux2_dev")
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"guidance_embeds": True}))
    with pytest.raises(UserError, match=r"is a FLUX\.2-dev, whose text encoder is not here; give it stored embeddings"):
        load_pipeline(model(folder))


def test_flux2_dev_takes_stored_embeddings_and_its_guidance_is_an_input(tmp_path):
    config = dataclasses.replace(tiny_qwen.KLEIN, guidance_embed=True)
    folder = tiny_qwen.write_flux2(tmp_path / "flux2_dev", config)
    states = np.random.default_rng(0).standard_normal((1, tiny_flux.LONGER, config.text_dim)).astype(np.float32)
    shape = list(states.shape[1:])
    settings = {"family": "FLUX.2", "text_tokens": tiny_flux.LONGER, "text": shape}
    write_embeddings(tmp_path / "made", ["a cat"], lambda _: {"text": states}, settings, 1, 1)
    load = lambda scale: load_pipeline(model(folder, embeddings=str(tmp_path / "made"), guidance=scale))
    assert load(None).passes == 1
    made = {scale: images(load(scale), prompts=["a cat"]) for scale in (None, 4.0, 2.0)}
    np.testing.assert_array_equal(made[None], made[4.0])
    assert np.abs(made[4.0] - made[2.0]).max() > 0.01


def test_layers_that_are_no_linear_ones_in_the_published_model(folders):
    expected = r"lora\.targets: found .*, expected layers that are linear in the published model, unlike image_in$"
    with pytest.raises(ConfigError, match=expected):
        load_pipeline(model(folders["sd3_medium"], lora=LoraOptions(("image_in$",), rank=2)))


ROWS = {
    "FLUX.1-dev": "FLUX.1-dev",
    "FLUX.1-schnell": "FLUX.1-schnell",
    "SD3.5 Medium": "stable-diffusion-3.5-medium",
    "SD3.5 Large": "stable-diffusion-3.5-large",
    "FLUX.2-klein-base-4B": "FLUX.2-klein-base-4B",
    "FLUX.2-klein(-base)-9B": "FLUX.2-klein-base-9B",
    "FLUX.2-dev": "FLUX.2-dev",
    "Z-Image": "Z-Image",
}


@pytest.mark.parametrize("row", ROWS)
def test_the_table_of_models_says_what_they_take(row):
    """TFLOP of a pass at 512 and 1024 pixels, and GB of weights, in docs/models.md."""
    line = next(line for line in DOCS.read_text().splitlines() if line.startswith(f"| {row} |"))
    work, weights = line.split("|")[6:8]
    *told, total = (float(each) for each in re.findall(r"\d+\.?\d*", f"{work.partition('with')[0]} {weights}"))
    family, sizes = released(ROWS[row])
    assert total == pytest.approx(2 * sum(leaf.size for leaf in jax.tree.leaves(family.shapes(sizes))) / 1e9, abs=0.06)
    tokens = 128 if row == "Z-Image" else None
    for pixels, tflop in zip((512, 1024), told[-2:], strict=True):
        options = PublishedOptions(height=pixels, width=pixels, guidance=4.0, text_tokens=tokens)
        pipeline = sketch_pipeline(ModelConfig("published", ROWS[row], options))
        digits = len(f"{tflop:g}".partition(".")[2])
        found = pipeline.forward_flops / pipeline.passes / 1e12
        assert tflop == pytest.approx(found, abs=0.51 * 10**-digits if digits else 0.5)


def test_a_model_that_is_not_known():
    with pytest.raises(UserError, match=r"org/x does not exist, and is not the name of a known model, of FLUX\.1, "):
        sketch_pipeline(ModelConfig("published", "org/x"))
