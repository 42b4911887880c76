"""transformers' files of CLIP and of its text encoder, complete and exact, and their config.json."""

import dataclasses
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.clip import Clip, ClipConfig, ClipText, ClipTextConfig, ClipVisionConfig, TransformerConfig
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.published.clip import (
    IGNORED,
    PREFIX,
    clip_layout,
    clip_text_layout,
    config_from_transformers,
    projected_text_config_from_transformers,
    text_config_from_transformers,
    text_prefix,
)
from tests.layouts import import_tensors

GOLDEN = Path(__file__).parents[2] / "golden"
PUBLISHED = json.loads((GOLDEN / "clip_l_text_shapes.json").read_text())
SMALL = ClipTextConfig(TransformerConfig(8, 3, 2, 12, "gelu"), vocab_size=10, length=5)
PROJECTED = dataclasses.replace(SMALL, projection_dim=6)
CLIP_L = ClipTextConfig(projection_dim=768)
CLIP_BIGG = ClipTextConfig(TransformerConfig(1280, 32, 20, 5120, "gelu"), projection_dim=1280)
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


def test_every_tensor_of_a_text_encoder_with_projection():
    """SD3.5's two. The table of CLIP-L is of FLUX.1's file, which is the same but has no projection."""
    small = {**PUBLISHED, "text_projection.weight": [768, 768]}
    large = json.loads((GOLDEN / "clip_bigg_text_shapes.json").read_text())
    for config, published, count in ((CLIP_L, small, 197), (CLIP_BIGG, large, 517)):
        layout = clip_text_layout(config)
        assert len(layout) == len({e.name for e in layout}) == count
        assert published_shapes(layout, template(config)) == {name: tuple(shape) for name, shape in published.items()}
    assert sum(leaf.size for leaf in jax.tree.leaves(template(CLIP_BIGG))) == 694_659_840


@pytest.mark.parametrize("config", [ClipTextConfig(), CLIP_L, CLIP_BIGG])
def test_every_number_of_our_tree_is_held_once(config):
    flat, layers = flatten_dict(template(config), sep="/"), config.transformer.num_layers
    held = [(leaf.path, leaf.layer) for e in clip_text_layout(config) for leaf in e.leaves]
    expected = {(path, layer) for path in flat for layer in (range(layers) if "/blocks/" in path else [None])}
    assert len(held) == len(expected)
    assert set(held) == expected


@pytest.mark.parametrize("config", [SMALL, PROJECTED])
@pytest.mark.parametrize("prefix", SPELLINGS)
def test_export_then_import_changes_nothing(prefix, config):
    params = random_params(config)
    layout = clip_text_layout(config, prefix)
    tensors = dict(export_tensors(layout, params))
    assert {name: tensor.shape for name, tensor in tensors.items()} == published_shapes(layout, params)
    chex.assert_trees_all_equal(import_tensors(layout, tensors, template(config)), params)
    if config is PROJECTED:
        kernel = params["text_projection"]["kernel"]
        np.testing.assert_array_equal(tensors["text_projection.weight"], kernel.T)


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

    assert all(ignored(f"{prefix}embeddings.position_ids") for prefix in (*SPELLINGS, "vision_model."))
    assert not any(map(ignored, PUBLISHED | published_clip()))


def published_clip():
    """Every tensor of PickScore's file, and of ViT-H-14's in transformers' format, but the numbers of positions."""
    return json.loads((GOLDEN / "clip_vit_h_14_shapes.json").read_text())


def clip_template(config):
    images = jax.ShapeDtypeStruct((1, config.vision.image_size, config.vision.image_size, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Clip(config).init, jax.random.key(0), images, ids)["params"]


def held_leaves(layout):
    """The leaves, or layers of them, that a layout holds, each of which it must hold once."""
    held = [(leaf.path, leaf.layer) for e in layout for leaf in e.leaves]
    assert len(held) == len(set(held))
    return set(held)


def leaves_of(config):
    layers = {"vision": config.vision.transformer.num_layers, "text": config.text.transformer.num_layers}
    return {
        (path, layer)
        for path in flatten_dict(clip_template(config), sep="/")
        for layer in (range(layers[path.split("/")[0]]) if "/blocks/" in path else [None])
    }


def test_every_tensor_of_the_published_clip_by_name_and_shape():
    layout, template = clip_layout(ClipConfig()), clip_template(ClipConfig())
    published = {name: tuple(shape) for name, shape in published_clip().items()}
    assert len(layout) == len(published) == 910
    assert published_shapes(layout, template) == published
    assert held_leaves(layout) == leaves_of(ClipConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(template)) == 986_109_441


def test_export_then_import_of_a_clip_changes_nothing():
    config = ClipConfig(ClipVisionConfig(TransformerConfig(12, 2, 2, 20, "gelu"), 16, 5), SMALL, 7)
    rng, template = np.random.default_rng(0), clip_template(config)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), template)
    tensors = dict(export_tensors(clip_layout(config), params))
    chex.assert_trees_all_equal(import_tensors(clip_layout(config), tensors, template), params)
    patches = tensors["vision_model.embeddings.patch_embedding.weight"]
    np.testing.assert_array_equal(patches.transpose(2, 3, 1, 0), params["vision"]["patches"]["kernel"])
    np.testing.assert_array_equal(tensors["visual_projection.weight"].T, params["image_projection"]["kernel"])
    np.testing.assert_array_equal(tensors["text_projection.weight"].T, params["text_projection"]["kernel"])


VIT_L_14 = {
    "architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "model_type": "clip",
    "projection_dim": 768,
    "text_config": {
        "bos_token_id": 0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
        "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 49408,
    },
    "text_config_dict": {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
    },
    "vision_config": {
        "hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 224, "intermediate_size": 4096,
        "layer_norm_eps": 1e-05, "model_type": "clip_vision_model", "num_attention_heads": 16,
        "num_hidden_layers": 24, "patch_size": 14,
    },
    "vision_config_dict": None,
}  # fmt: skip


def test_openais_large_clip():
    """427,616,513 parameters in 590 tensors."""
    config = config_from_transformers(Published(VIT_L_14))
    vision = ClipVisionConfig(TransformerConfig(1024, 24, 16, 4096, "quick_gelu"))
    assert config == ClipConfig(vision, ClipTextConfig(), 768)
    layout, template = clip_layout(config), clip_template(config)
    assert len(layout) == 590
    assert held_leaves(layout) == leaves_of(config)
    assert sum(leaf.size for leaf in jax.tree.leaves(template)) == 427_616_513


def test_what_a_config_does_not_say_is_transformers_default():
    config = config_from_transformers(Published({"text_config": None, "vision_config": {"hidden_size": 96}}))
    assert config.text.transformer == TransformerConfig(512, 12, 8, 2048, "quick_gelu")
    assert config.vision == ClipVisionConfig(TransformerConfig(96, 12, 12, 3072, "quick_gelu"), 224, 32)
    assert config.dim == 512
    assert config_from_transformers(Published({"vision_config_dict": {"patch_size": 16}})).vision.patch_size == 16


def test_clips_of_other_kinds_are_refused():
    with pytest.raises(UserError, match=r"config.json: vision_config.num_channels is 4; must be 3"):
        config_from_transformers(Published({"vision_config": {"num_channels": 4}}))
    with pytest.raises(UserError, match=r"config.json: vision_config.hidden_act is .relu.; must be "):
        config_from_transformers(Published({"vision_config": {"hidden_act": "relu"}}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vision_config": {"patch_size": 300}}, "vision_config.patch_size is 300; must be at most image_size 224"),
        ({"vision_config": {"num_attention_heads": 5}}, "vision_config.num_attention_heads is 5; must be a divisor of"),
        ({"text_config": {"eos_token_id": [2]}}, r"text_config.eos_token_id is \[2\]; must be a token's id"),
        ({"text_config": [1]}, r"text_config is \[1\]; must be an object"),
        ({"projection_dim": "512"}, 'projection_dim is "512"; must be a positive integer'),
    ],
)
def test_sizes_that_no_clip_has(config, message):
    with pytest.raises(UserError, match=rf"^config\.json: {message}"):
        config_from_transformers(Published(config))


PUBLISHED_CONFIG = {
    "_name_or_path": "openai/clip-vit-large-patch14", "architectures": ["CLIPTextModel"], "attention_dropout": 0.0,
    "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768,
    "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77, "model_type": "clip_text_model", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "torch_dtype": "bfloat16", "vocab_size": 49408,
}  # fmt: skip


def test_published_configs():
    """An end id of 2 is what old files say and do not mean."""
    assert text_config_from_transformers(Published(PUBLISHED_CONFIG)) == ClipTextConfig()
    resaved = text_config_from_transformers(
        Published({**PUBLISHED_CONFIG, "eos_token_id": 49407, "hidden_act": "gelu"})
    )
    assert (resaved.eos_id, resaved.transformer.activation) == (49407, "gelu")


def test_published_configs_with_projection():
    """FLUX.1's file names a projection too, which its encoder does not have."""
    architecture = {"architectures": ["CLIPTextModelWithProjection"], "torch_dtype": "float16"}
    small = Published({**PUBLISHED_CONFIG, **architecture})
    assert projected_text_config_from_transformers(small) == CLIP_L
    large = {
        "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 20, "intermediate_size": 5120,
        "hidden_act": "gelu", "projection_dim": 1280,
    }  # fmt: skip
    assert projected_text_config_from_transformers(Published({**small, **large})) == CLIP_BIGG
    silent = {key: value for key, value in small.items() if key != "projection_dim"}
    assert projected_text_config_from_transformers(Published(silent)).projection_dim == 512
    with pytest.raises(UserError, match=r"^config\.json: projection_dim is 0; must be a positive integer$"):
        projected_text_config_from_transformers(Published({**small, "projection_dim": 0}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is .relu.; must be .quick_gelu. or .gelu."),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06; must be 1e-05"),
    ],
)
def test_configs_of_other_models_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        text_config_from_transformers(Published({**PUBLISHED_CONFIG, **change}))


def test_a_missing_size_is_named():
    with pytest.raises(UserError, match=r"config.json: hidden_size is missing"):
        text_config_from_transformers(
            Published({key: v for key, v in PUBLISHED_CONFIG.items() if key != "hidden_size"})
        )
