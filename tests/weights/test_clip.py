"""The published files of CLIP's text encoder, complete and exact in both spellings, and its config.json."""

import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from egrpo_jax.errors import UserError
from egrpo_jax.models.clip import ClipText, ClipTextConfig, TransformerConfig
from egrpo_jax.weights.clip import IGNORED, PREFIX, clip_text_layout, text_config_from_transformers, text_prefix
from egrpo_jax.weights.layout import export_tensors, import_tensors, published_shapes

PUBLISHED = json.loads((Path(__file__).parent.parent / "golden" / "clip_l_text_shapes.json").read_text())
SMALL = ClipTextConfig(TransformerConfig(8, 3, 2, 12, "gelu"), vocab_size=10, length=5)
SPELLINGS = (PREFIX, "")


def template(config):
    """Shapes of the parameter tree."""
    return jax.eval_shape(ClipText(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), template(config))


@pytest.mark.parametrize("prefix", SPELLINGS)
def test_every_published_tensor_by_name_and_shape(prefix):
    published = {prefix + name.removeprefix(PREFIX): tuple(shape) for name, shape in PUBLISHED.items()}
    layout = clip_text_layout(ClipTextConfig(), prefix)
    assert len(layout) == len({e.name for e in layout}) == 196
    assert published_shapes(layout, template(ClipTextConfig())) == published
    assert text_prefix(published) == prefix


def test_every_number_of_our_tree_is_held_once():
    flat = flatten_dict(template(ClipTextConfig()), sep="/")
    held = [(leaf.path, leaf.layer) for e in clip_text_layout(ClipTextConfig()) for leaf in e.leaves]
    expected = {(path, layer) for path in flat for layer in (range(12) if "/blocks/" in path else [None])}
    assert len(held) == len(expected)
    assert set(held) == expected


@pytest.mark.parametrize("prefix", SPELLINGS)
def test_export_then_import_changes_nothing(prefix):
    params = random_params(SMALL)
    layout = clip_text_layout(SMALL, prefix)
    tensors = dict(export_tensors(layout, params))
    assert {name: tensor.shape for name, tensor in tensors.items()} == published_shapes(layout, params)
    chex.assert_trees_all_equal(import_tensors(layout, tensors, template(SMALL)), params)


def test_kernels_are_transposed_and_layers_are_in_order():
    params = random_params(SMALL)
    tensors = dict(export_tensors(clip_text_layout(SMALL), params))
    blocks = params["transformer"]["blocks"]
    np.testing.assert_array_equal(
        tensors["text_model.encoder.layers.2.self_attn.k_proj.weight"], blocks["to_k"]["kernel"][2].T
    )
    np.testing.assert_array_equal(tensors["text_model.encoder.layers.1.mlp.fc1.bias"], blocks["mlp_1"]["bias"][1])
    np.testing.assert_array_equal(
        tensors["text_model.encoder.layers.0.layer_norm2.weight"], blocks["mlp_norm"]["scale"][0]
    )


def test_position_ids_alone_are_ignored():
    def ignored(name):
        return any(re.fullmatch(pattern, name) for pattern in IGNORED)

    assert all(ignored(f"{prefix}embeddings.position_ids") for prefix in SPELLINGS)
    assert not any(map(ignored, PUBLISHED))


PUBLISHED_CONFIG = {
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
    "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "bfloat16", "vocab_size": 49408,
}  # fmt: skip


def test_published_configs():
    """An end id of 2 is what old files say and do not mean."""
    assert text_config_from_transformers(PUBLISHED_CONFIG) == ClipTextConfig()
    resaved = text_config_from_transformers({**PUBLISHED_CONFIG, "eos_token_id": 49407, "hidden_act": "gelu"})
    assert (resaved.eos_id, resaved.transformer.activation) == (49407, "gelu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; CLIP has one of quick_gelu, gelu"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06; CLIP has 1e-05"),
    ],
)
def test_configs_of_other_models_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        text_config_from_transformers({**PUBLISHED_CONFIG, **change})


def test_a_missing_size_is_named():
    with pytest.raises(UserError, match=r"config.json: hidden_size is missing"):
        text_config_from_transformers({key: v for key, v in PUBLISHED_CONFIG.items() if key != "hidden_size"})
