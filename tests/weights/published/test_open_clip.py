"""open_clip's files of CLIP, complete and exact, and open_clip_config.json."""

import copy
import json

import chex
import jax
import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.clip import ClipConfig, ClipTextConfig, ClipVisionConfig, TransformerConfig
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.published.open_clip import config_from_open_clip, open_clip_layout
from tests.layouts import import_tensors
from tests.weights.published.test_clip import GOLDEN, clip_template, held_leaves, leaves_of

SMALL = ClipConfig(
    ClipVisionConfig(TransformerConfig(12, 2, 2, 20, "gelu"), 16, 5),
    ClipTextConfig(TransformerConfig(8, 3, 2, 12, "gelu"), vocab_size=10, length=5),
    7,
)
VIT_H_14 = {
    "embed_dim": 1024,
    "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
}


def test_every_published_tensor_by_name_and_shape():
    """Of laion's ViT-H-14, and of HPSv2, which has the same."""
    file = json.loads((GOLDEN / "open_clip_vit_h_14_shapes.json").read_text())
    layout = open_clip_layout(ClipConfig())
    assert len(layout) == len(file) == 686
    assert published_shapes(layout, clip_template(ClipConfig())) == {name: tuple(shape) for name, shape in file.items()}
    assert held_leaves(layout) == leaves_of(ClipConfig())


def test_export_then_import_changes_nothing():
    rng, template = np.random.default_rng(0), clip_template(SMALL)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), template)
    tensors = dict(export_tensors(open_clip_layout(SMALL), params))
    chex.assert_trees_all_equal(import_tensors(open_clip_layout(SMALL), tensors, template), params)
    blocks = params["vision"]["transformer"]["blocks"]
    queries, keys, values = np.split(tensors["visual.transformer.resblocks.1.attn.in_proj_weight"], 3)
    for part, name in ((queries, "to_q"), (keys, "to_k"), (values, "to_v")):
        np.testing.assert_array_equal(part.T, blocks[name]["kernel"][1], err_msg=name)
    np.testing.assert_array_equal(
        tensors["transformer.resblocks.2.attn.in_proj_bias"][8:16],
        params["text"]["transformer"]["blocks"]["to_k"]["bias"][2],
    )
    np.testing.assert_array_equal(tensors["visual.proj"], params["image_projection"]["kernel"])  # not transposed
    np.testing.assert_array_equal(tensors["text_projection"], params["text_projection"]["kernel"])


def test_published_configs():
    """laion's ViT-H-14, and DFN5B's at 378 pixels with OpenAI's activation."""
    assert config_from_open_clip(Published(VIT_H_14)) == ClipConfig()
    dfn = copy.deepcopy(VIT_H_14) | {"quick_gelu": True}
    dfn["vision_cfg"]["image_size"] = 378
    config = config_from_open_clip(Published(dfn))
    assert config.vision == ClipVisionConfig(TransformerConfig(1280, 32, 16, 5120, "quick_gelu"), 378, 14)
    assert config.vision.tokens == 27**2 + 1
    assert config.text.transformer.activation == "quick_gelu"


def test_what_a_config_does_not_say_is_open_clips_default():
    config = config_from_open_clip(
        Published({"embed_dim": 512, "vision_cfg": {"patch_size": 32}, "text_cfg": {"mlp_ratio": 3}})
    )
    assert config.vision == ClipVisionConfig(TransformerConfig(768, 12, 12, 3072, "gelu"), 224, 32)
    assert config.text == ClipTextConfig(TransformerConfig(512, 12, 8, 1536, "gelu"))
    assert config.dim == 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision_cfg": {"timm_model_name": "vit"}},
            "unknown vision_cfg.timm_model_name; this kind of model has image_size",
        ),
        ({"text_cfg": {"hf_model_name": "xlm-roberta"}}, "unknown text_cfg.hf_model_name; "),
        ({"custom_text": True}, "unknown custom_text; "),
    ],
)
def test_models_of_other_kinds_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        config_from_open_clip(Published(VIT_H_14 | change))


def test_a_missing_part_is_named():
    with pytest.raises(UserError, match="text_cfg is missing; must be an object"):
        config_from_open_clip(Published({key: value for key, value in VIT_H_14.items() if key != "text_cfg"}))


@pytest.mark.parametrize(
    ("section", "key", "value", "expected"),
    [
        ("vision_cfg", "head_width", 81, "a divisor of width 1280"),
        ("vision_cfg", "layers", [3, 4, 6, 3], "a positive integer"),
        ("vision_cfg", "patch_size", 225, "at most image_size 224"),
        ("vision_cfg", "mlp_ratio", 1e300, "such that times width 1280 it is a size"),
        ("text_cfg", "mlp_ratio", 1e-9, "such that times width 1024 it is a size"),
        ("text_cfg", "heads", 3, "a divisor of width 1024"),
        ("text_cfg", "vocab_size", None, "a positive integer"),
    ],
)
def test_sizes_that_no_model_has(section, key, value, expected):
    config = copy.deepcopy(VIT_H_14)
    config[section][key] = value
    with pytest.raises(UserError, match=rf"^x\.json: {section}\.{key} is .*; must be {expected}$"):
        config_from_open_clip(Published(config, "x.json"))
