"""LoRA files: names and values stated by hand, there and back."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.flux import FluxConfig
from egrpo_jax.models.lora import init_lora, merge_lora
from egrpo_jax.pipelines import published
from egrpo_jax.pipelines.families import FLUX
from egrpo_jax.weights.layout import export_tensors
from egrpo_jax.weights.lora import FILE_NAME, export_lora, load_lora, save_lora
from egrpo_jax.weights.published.flux import flux_layout
from tests.weights.tiny_lora import LAYOUT, TO_Q, adapter, delta, random_like, random_lora, template, write

FLOW_GRPO, DANCE_GRPO = (options.adapters(FLUX.presets) for options in (published.FLOW_GRPO, published.DANCE_GRPO))


def test_a_published_file_by_name_shape_and_type(tmp_path):
    lora = random_lora((r"double_blocks/image_out$", r"single_blocks/mlp$", r"^final$"))
    path = tmp_path / "new" / FILE_NAME
    save_lora(path, lora, 1.5, LAYOUT)
    tensors = load_file(path)
    expected = {"transformer.proj_out": (16, 4)}
    expected |= {f"transformer.transformer_blocks.{layer}.attn.to_out.0": (16, 16) for layer in range(2)}
    expected |= {f"transformer.single_transformer_blocks.{layer}.proj_mlp": (16, 64) for layer in range(3)}
    shapes = {f"{module}.lora_A.weight": (3, inputs) for module, (inputs, _) in expected.items()}
    shapes |= {f"{module}.lora_B.weight": (outputs, 3) for module, (_, outputs) in expected.items()}
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    with safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    image_out, final = lora["double_blocks"]["image_out"], lora["final"]
    published = "transformer.transformer_blocks.1.attn.to_out.0"
    np.testing.assert_array_equal(tensors[f"{published}.lora_A.weight"], image_out["a"][1].T)
    np.testing.assert_array_equal(tensors[f"{published}.lora_B.weight"], 1.5 * image_out["b"][1].T)
    np.testing.assert_array_equal(tensors["transformer.proj_out.lora_B.weight"], 1.5 * final["b"].T)
    assert [child.name for child in path.parent.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(("config", "modules"), [(FLOW_GRPO, 12 * 19 + 3 * 38), (DANCE_GRPO, 4 * 19 + 3 * 38)])
def test_every_published_target_of_flux_dev_is_exported(config, modules):
    """One row and column stand for each layer; the shapes do not matter here."""
    sizes = FluxConfig()
    lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), template(sizes), config))
    small = jax.tree.map(lambda leaf: np.zeros((leaf.shape[0], 1, 1), np.float32), lora)
    names = export_lora(small, config.scale, flux_layout(sizes, "diffusers"))
    assert len(names) == 2 * modules
    suffixes = {
        name.removesuffix(".lora_A.weight").split("_blocks.")[1].partition(".")[2] for name in names if "lora_A" in name
    }
    assert suffixes >= {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"}
    assert len(suffixes) == {FLOW_GRPO: 12, DANCE_GRPO: 4}[config]


def test_export_then_import_with_another_scale(tmp_path):
    lora = random_lora()
    save_lora(tmp_path / FILE_NAME, lora, 1.5, LAYOUT)
    loaded = load_lora(tmp_path, 0.5, LAYOUT, template())  # a folder will do
    back = flatten_dict(loaded, sep="/")
    for path, leaf in flatten_dict(lora, sep="/").items():
        np.testing.assert_allclose(back[path], leaf * (3 if path.endswith("/b") else 1), rtol=1e-6, err_msg=path)
        assert back[path].dtype == np.float32
    assert back.keys() == flatten_dict(lora, sep="/").keys()


def test_the_file_says_what_merged_weights_say(tmp_path):
    """W + B A of the published tensors is the published form of the merged tree, rows swapped where they are."""
    params, lora = random_like(template(), 1), random_lora()
    save_lora(tmp_path / FILE_NAME, lora, 1.5, LAYOUT)
    tensors = load_file(tmp_path / FILE_NAME)
    merged = dict(export_tensors(LAYOUT, merge_lora(params, lora, 1.5)))
    adapted = 0
    for name, weight in export_tensors(LAYOUT, params):
        module = f"transformer.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in tensors:
            adapted += 1
            weight = weight + tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        np.testing.assert_allclose(merged[name], weight, atol=1e-4, err_msg=name)
    assert adapted == 2 * 14 + 3 * 6 + 10


def test_ranks_that_differ_and_layers_left_out(tmp_path):
    low, high = adapter(TO_Q, rank=2), adapter("transformer_blocks.0.attn.to_q", rank=4, seed=1)
    only = adapter("single_transformer_blocks.2.attn.to_v", seed=2)
    loaded = load_lora(write(tmp_path / "x.safetensors", low | high | only), 2.0, LAYOUT, template())
    shapes = {path: leaf.shape for path, leaf in flatten_dict(loaded, sep="/").items()}
    assert shapes == {
        "double_blocks/image_qkv/to_q/a": (2, 16, 4), "double_blocks/image_qkv/to_q/b": (2, 4, 16),
        "single_blocks/qkv/to_v/a": (3, 16, 2), "single_blocks/qkv/to_v/b": (3, 2, 16),
    }  # fmt: skip
    for layer, tensors in ((0, high), (1, low)):
        a, b = tensors.values()
        np.testing.assert_allclose(delta(loaded, layer), (b @ a).T, rtol=1e-4, atol=1e-6)
    a, b = only.values()
    to_v = ("single_blocks", "qkv", "to_v")
    np.testing.assert_allclose(delta(loaded, 2, to_v), (b @ a).T, rtol=1e-4, atol=1e-6)
    assert not delta(loaded, 0, to_v).any()


def test_half_precision_files(tmp_path):
    exact = adapter()
    halves = {name: tensor.astype(jnp.bfloat16) for name, tensor in exact.items()}
    loaded = load_lora(write(tmp_path / "x.safetensors", halves), 2.0, LAYOUT, template())
    chex.assert_trees_all_equal_dtypes(loaded, jax.tree.map(lambda leaf: leaf.astype(np.float32), loaded))
    a, b = (tensor.astype(np.float32) for tensor in halves.values())
    np.testing.assert_allclose(delta(loaded), (b @ a).T, rtol=1e-5, atol=1e-6)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.safetensors"):
        load_lora(tmp_path / "nowhere.safetensors", 1.0, LAYOUT, template())


def test_what_cannot_be_exported_or_written(tmp_path):
    lora = {"elsewhere": {"a": np.zeros((2, 3)), "b": np.zeros((3, 2))}}
    with pytest.raises(UserError, match="adapters of elsewhere: the published model has no such"):
        export_lora(lora, 1.0, LAYOUT)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_lora(tmp_path / "file" / FILE_NAME, random_lora(), 1.0, LAYOUT)
