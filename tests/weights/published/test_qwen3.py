"""The published files of Qwen3, complete and exact as far as they are needed, and its config.json."""

import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.qwen3 import Qwen3, Qwen3Config
from egrpo_jax.weights.configs import Published, read_config
from egrpo_jax.weights.files import open_tensors
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.load import load_params
from egrpo_jax.weights.published.qwen3 import (
    CLASS_NAME,
    config_from_transformers,
    ignored,
    name_prefix,
    qwen3_layout,
)
from tests.layouts import import_tensors

PUBLISHED = json.loads((Path(__file__).parents[2] / "golden" / "qwen3_4b_shapes.json").read_text())
KLEIN, Z_IMAGE = 27, 35
SMALL = Qwen3Config(vocab_size=10, width=6, num_layers=12, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=5)
SIZE_8B = Qwen3Config(width=4096, mlp_dim=12_288)
TIED = {"lm_head.weight": PUBLISHED["model.embed_tokens.weight"]}


def template(config, num_layers):
    """Shapes of the parameter tree."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Qwen3(config, (num_layers,)).init, jax.random.key(0), ids, ids.update(dtype=bool))["params"]


def random_params(config, num_layers):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), template(config, num_layers))


def is_ignored(name, config, num_layers):
    return any(re.fullmatch(pattern, name) for pattern in ignored(config, num_layers))


@pytest.mark.parametrize("head", [{}, TIED])
@pytest.mark.parametrize(("num_layers", "count"), [(KLEIN, 298), (Z_IMAGE, 386)])
def test_every_published_tensor_by_name_and_shape(num_layers, count, head):
    """Each is in the layout or ignored, and none both."""
    layout = qwen3_layout(num_layers)
    assert len(layout) == len({e.name for e in layout}) == count
    shapes = published_shapes(layout, template(Qwen3Config(), num_layers))
    published = {name: tuple(shape) for name, shape in (PUBLISHED | head).items()}
    assert shapes == {n: shape for n, shape in published.items() if not is_ignored(n, Qwen3Config(), num_layers)}


def test_the_sizes_of_8b():
    shapes = published_shapes(qwen3_layout(KLEIN), template(SIZE_8B, KLEIN))
    sizes = {2560: 4096, 9728: 12_288}
    queries = {"model.layers.26.self_attn.q_proj.weight": (4096, 4096)}
    scaled = {n: tuple(sizes.get(size, size) for size in PUBLISHED[n]) for n in shapes}
    assert shapes == scaled | queries


def test_what_is_ignored_is_that_alone():
    taken = ["model.layers.8.mlp.up_proj.weight", "layers.7.input_layernorm.weight", "model.embed_tokens.weight"]
    later = ["model.layers.9.mlp.up_proj.weight", "layers.11.input_layernorm.weight", "norm.weight", "lm_head.weight"]
    other = ["model.layers.12.mlp.up_proj.weight", "model.layers.90.mlp.up_proj.weight", "visual.norm.weight"]
    assert [is_ignored(name, SMALL, 9) for name in taken + later + other] == [False] * 3 + [True] * 4 + [False] * 3


@pytest.mark.parametrize("num_layers", [KLEIN, Z_IMAGE])
def test_every_number_of_our_tree_is_held_once(num_layers):
    flat = flatten_dict(template(Qwen3Config(), num_layers), sep="/")
    held = [(leaf.path, leaf.layer) for e in qwen3_layout(num_layers) for leaf in e.leaves]
    expected = {
        (path, layer) for path in flat for layer in (range(num_layers) if path.startswith("blocks/") else [None])
    }
    assert len(held) == len(expected)
    assert set(held) == expected


def test_export_then_import_changes_nothing():
    params = random_params(SMALL, 3)
    layout = qwen3_layout(3)
    tensors = dict(export_tensors(layout, params))
    assert {name: tensor.shape for name, tensor in tensors.items()} == published_shapes(layout, params)
    chex.assert_trees_all_equal(import_tensors(layout, tensors, template(SMALL, 3)), params)


def test_kernels_are_transposed_and_layers_are_in_order():
    params = random_params(SMALL, 3)
    tensors, blocks = dict(export_tensors(qwen3_layout(3), params)), params["blocks"]
    for name, kernel in {"mlp.gate_proj": "mlp_gate", "mlp.up_proj": "mlp_in", "self_attn.o_proj": "out"}.items():
        np.testing.assert_array_equal(tensors[f"model.layers.2.{name}.weight"], blocks[kernel]["kernel"][2].T)
    for name, scale in {"input_layernorm": "attention_norm", "self_attn.k_norm": "norm_k"}.items():
        np.testing.assert_array_equal(tensors[f"model.layers.1.{name}.weight"], blocks[scale]["scale"][1])


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_a_whole_file_gives_its_first_layers(tmp_path, prefix):
    """As `Qwen3ForCausalLM` and `Qwen3Model` are saved."""
    params = random_params(SMALL, 11)
    tensors = dict(export_tensors(qwen3_layout(11, prefix), params))
    tensors |= {f"{prefix}norm.weight": np.ones(6, np.float32)}
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()} if prefix else {}
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    files = open_tensors(tmp_path)
    layout = qwen3_layout(9, name_prefix(files))
    loaded = load_params(files, layout, template(SMALL, 9), ignored(SMALL, 9))
    expected = {**params, "blocks": jax.tree.map(lambda leaf: leaf[:9], params["blocks"])}
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, loaded), expected)


PUBLISHED_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02,
    "intermediate_size": 9728, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
RESAVED_CONFIG = {
    **{key: value for key, value in PUBLISHED_CONFIG.items() if not key.startswith("rope_")},
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "layer_types": ["full_attention"] * 36,
}  # fmt: skip


def test_published_configs():
    assert config_from_transformers(Published(PUBLISHED_CONFIG)) == Qwen3Config()
    assert config_from_transformers(Published(RESAVED_CONFIG)) == Qwen3Config()
    sizes_8b = {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
    assert config_from_transformers(Published(PUBLISHED_CONFIG | sizes_8b)) == SIZE_8B


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "Qwen3Model"])
def test_both_classes_are_read(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIG | {"architectures": [name]}))
    assert config_from_transformers(read_config(tmp_path, CLASS_NAME)) == Qwen3Config()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}))
    with pytest.raises(UserError, match=r"config\.json is of a Qwen2ForCausalLM; must be of a qwen3$"):
        read_config(tmp_path, CLASS_NAME)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": None},
        {"rope_theta": 5, "rope_parameters": {"rope_theta": 1000000.0}},
    ],
)
def test_rotations_that_are_not_scaled(rope):
    assert config_from_transformers(Published({**PUBLISHED_CONFIG, **rope})) == Qwen3Config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"; must be "silu"'),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05; must be 1e-06"),
        ({"attention_bias": True}, "attention_bias is true; must be false"),
        ({"use_sliding_window": True}, "use_sliding_window is true; must be false"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is .*; must be .*full_attention"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r'rope_scaling\.rope_type is "yarn"; must be "default"'),
        ({"rope_scaling": {"type": "linear"}}, r'rope_scaling\.type is "linear"; must be "default"'),
        ({"rope_parameters": {"rope_type": "yarn"}}, r'rope_parameters\.rope_type is "yarn"; must be "default"'),
        ({"rope_parameters": {"rope_theta": "1e6"}}, r'rope_parameters\.rope_theta is "1e6"; must be a positive'),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; must be an object"),
        ({"rope_theta": None}, "rope_theta is null; must be a positive, finite number, here or in rope_parameters"),
        ({"rope_theta": -1}, "rope_theta is -1; must be a positive, finite number"),
        ({"num_key_value_heads": 5}, "num_key_value_heads is 5; must be a divisor of num_attention_heads 32"),
        ({"num_key_value_heads": None}, "num_key_value_heads is null; must be a positive integer"),
        ({"head_dim": 127}, "head_dim is 127; must be a positive, even integer"),
    ],
)
def test_configs_of_other_models_are_refused(change, message):
    with pytest.raises(UserError, match=message) as caught:
        config_from_transformers(Published({**PUBLISHED_CONFIG, **change}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["hidden_size", "rope_theta"])
def test_what_is_missing_is_named(missing):
    with pytest.raises(UserError, match=rf"config.json: {missing} is missing; must be a positive"):
        config_from_transformers(Published({key: v for key, v in PUBLISHED_CONFIG.items() if key != missing}))
