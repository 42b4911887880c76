"""Both formats' files of SD3.5, complete and exact, and diffusers' config.json."""

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
from egrpo_jax.models.sd3 import Sd3, Sd3Config
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.published.sd3 import config_from_diffusers, config_to_diffusers, sd3_layout
from tests.layouts import import_tensors

GOLDEN = Path(__file__).parents[2] / "golden"
MEDIUM = Sd3Config()
LARGE = Sd3Config(num_blocks=38, num_dual_blocks=0, num_heads=38, max_grid=192)
SMALL = Sd3Config(
    in_channels=12, num_blocks=5, num_dual_blocks=2, num_heads=2, head_dim=4, text_dim=6, pooled_dim=5, max_grid=3,
)  # fmt: skip
sizes = pytest.mark.parametrize(("name", "config"), [("medium", MEDIUM), ("large", LARGE)])
FORMATS = ("diffusers", "original")
formats = pytest.mark.parametrize("fmt", FORMATS)
COUNTS = {
    ("medium", "diffusers"): 909,
    ("large", "diffusers"): 1227,
    ("medium", "original"): 665,
    ("large", "original"): 923,
}
RULES = (
    (r"^pos_embed\.pos_embed$", "pos_embed"),
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^time_text_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^time_text_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^time_text_embed\.text_embedder\.linear_1\.", "y_embedder.mlp.0."),
    (r"^time_text_embed\.text_embedder\.linear_2\.", "y_embedder.mlp.2."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^transformer_blocks\.", "joint_blocks."),
    (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
    (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
    (r"\.ff\.net\.0\.proj\.", ".x_block.mlp.fc1."),
    (r"\.ff\.net\.2\.", ".x_block.mlp.fc2."),
    (r"\.ff_context\.net\.0\.proj\.", ".context_block.mlp.fc1."),
    (r"\.ff_context\.net\.2\.", ".context_block.mlp.fc2."),
    (r"\.attn\.norm_added_([qk])\.", r".context_block.attn.ln_\1."),
    (r"\.(attn2?)\.norm_([qk])\.", r".x_block.\1.ln_\2."),
    (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
    (r"\.(attn2?)\.to_out\.0\.", r".x_block.\1.proj."),
    (r"\.attn\.add_q_proj\.", ".context_block.attn.qkv."),
    (r"\.(attn2?)\.to_q\.", r".x_block.\1.qkv."),
)
"""From diffusers' names to the original ones."""


def template(config):
    """Shapes of the parameter tree."""
    arrays = (
        jnp.zeros((1, 1, config.in_channels)), jnp.ones(1), jnp.zeros((1, 1, config.text_dim)),
        jnp.zeros((1, config.pooled_dim)),
    )  # fmt: skip
    return jax.eval_shape(lambda: Sd3(config).init(jax.random.key(0), *arrays, grid=(1, 1)))["params"]


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), template(config))


def original_shapes(published):
    """Names of single files by `RULES`; queries, keys and values are joined."""
    renamed = {}
    for name, shape in published.items():
        if re.search(r"\.(to_[kv]|add_[kv]_proj)\.", name):
            continue
        if re.search(r"\.(to_q|add_q_proj)\.", name):
            shape = (3 * shape[0], *shape[1:])
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = shape
    return renamed


@formats
@sizes
def test_every_published_tensor_by_name_and_shape(name, config, fmt):
    published = json.loads((GOLDEN / f"sd35_{name}_shapes.json").read_text())
    published = {key: tuple(shape) for key, shape in published.items()}
    layout = sd3_layout(config, fmt)
    assert len(layout) == len({e.name for e in layout}) == COUNTS[name, fmt]
    expected = published if fmt == "diffusers" else original_shapes(published)
    assert published_shapes(layout, template(config)) == expected


@formats
@sizes
def test_every_number_of_our_tree_is_held_once(name, config, fmt):
    del name
    flat = flatten_dict(template(config), sep="/")
    held = [leaf for e in sd3_layout(config, fmt) for leaf in e.leaves]
    expected = {
        (path, layer)
        for path, leaf in flat.items()
        for layer in (range(leaf.shape[0]) if "_blocks/" in path else [None])
    }
    assert len(held) == len(expected)
    assert {(leaf.path, leaf.layer) for leaf in held} == expected


@formats
@pytest.mark.parametrize("dual", [0, 2, 4])
def test_export_then_import_changes_nothing(dual, fmt):
    config = Sd3Config(**{**vars(SMALL), "num_dual_blocks": dual})
    params, layout = random_params(config), sd3_layout(config, fmt)
    tensors = dict(export_tensors(layout, params))
    assert {name: tensor.shape for name, tensor in tensors.items()} == published_shapes(layout, params)
    chex.assert_trees_all_equal(import_tensors(layout, tensors, template(config)), params)


def test_original_files_have_halves_in_our_order_and_joined_queries_keys_and_values():
    params = random_params(SMALL)
    tensors = dict(export_tensors(sd3_layout(SMALL, "original"), params))
    np.testing.assert_array_equal(
        tensors["joint_blocks.4.context_block.adaLN_modulation.1.bias"],
        params["last_blocks"]["text_modulation"]["linear"]["bias"][0],
    )
    np.testing.assert_array_equal(
        tensors["final_layer.adaLN_modulation.1.weight"], params["final_modulation"]["linear"]["kernel"].T
    )
    heads = [params["dual_blocks"]["self_qkv"][f"to_{name}"]["kernel"][1].T for name in "qkv"]
    np.testing.assert_array_equal(tensors["joint_blocks.1.x_block.attn2.qkv.weight"], np.concatenate(heads))


def test_layers_and_forms_by_hand():
    """Two dual, two plain and the last block, numbered through; patches, halves and positions."""
    params = random_params(SMALL)
    tensors = dict(export_tensors(sd3_layout(SMALL), params))
    second_plain = params["plain_blocks"]["text_qkv"]["to_v"]["kernel"][1].T
    np.testing.assert_array_equal(tensors["transformer_blocks.3.attn.add_v_proj.weight"], second_plain)
    assert "transformer_blocks.1.attn2.to_q.weight" in tensors
    assert not [name for name in tensors if name.startswith(("transformer_blocks.2.attn2", "transformer_blocks.5"))]
    shift, scale = np.split(params["last_blocks"]["text_modulation"]["linear"]["bias"][0], 2)
    np.testing.assert_array_equal(
        tensors["transformer_blocks.4.norm1_context.linear.bias"], np.concatenate([scale, shift])
    )
    np.testing.assert_array_equal(
        tensors["transformer_blocks.3.norm1_context.linear.bias"],
        params["plain_blocks"]["text_modulation"]["linear"]["bias"][1],
    )
    c, i, j = 2, 1, 0  # ours is row or column 4c + 2i + j
    kernel = params["image_in"]["kernel"][4 * c + 2 * i + j]
    np.testing.assert_array_equal(tensors["pos_embed.proj.weight"][:, c, i, j], kernel)
    row = (2 * i + j) * 3 + c
    np.testing.assert_array_equal(tensors["proj_out.weight"][row], params["final"]["kernel"][:, 4 * c + 2 * i + j])
    assert tensors["proj_out.bias"][row] == params["final"]["bias"][4 * c + 2 * i + j]
    np.testing.assert_array_equal(tensors["pos_embed.pos_embed"], params["positions"][None])


PUBLISHED_MEDIUM = {
    "_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.32.0.dev0", "attention_head_dim": 64,
    "caption_projection_dim": 1536, "dual_attention_layers": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
    "in_channels": 16, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24, "out_channels": 16,
    "patch_size": 2, "pooled_projection_dim": 2048, "pos_embed_max_size": 384, "qk_norm": "rms_norm",
    "sample_size": 128,
}  # fmt: skip
PUBLISHED_LARGE = {
    **PUBLISHED_MEDIUM, "caption_projection_dim": 2432, "num_attention_heads": 38, "num_layers": 38,
    "pos_embed_max_size": 192,
}  # fmt: skip
del PUBLISHED_LARGE["dual_attention_layers"]


def test_published_configs():
    assert config_from_diffusers(Published(PUBLISHED_MEDIUM)) == MEDIUM
    for empty in ({}, {"dual_attention_layers": []}, {"dual_attention_layers": ()}, {"out_channels": None}):
        assert config_from_diffusers(Published({**PUBLISHED_LARGE, **empty})) == LARGE


@pytest.mark.parametrize("key", ["num_layers", "num_attention_heads", "caption_projection_dim", "pos_embed_max_size"])
def test_what_is_silent_is_the_class_default_and_not_the_published_value(key):
    """18 layers and heads, 1152 channels, 96 places: files that are silent mean these, or are refused."""
    silent = {k: v for k, v in PUBLISHED_LARGE.items() if k != key}
    if key in ("num_attention_heads", "caption_projection_dim"):
        with pytest.raises(UserError, match=r"caption_projection_dim is \d+; must be num_attention_heads times"):
            config_from_diffusers(Published(silent))
    else:
        config = config_from_diffusers(Published(silent))
        assert (config.num_blocks, config.max_grid) == {"num_layers": (18, 192), "pos_embed_max_size": (38, 96)}[key]


@pytest.mark.parametrize("config", [MEDIUM, LARGE, SMALL])
def test_config_there_and_back(config):
    written = json.loads(json.dumps(config_to_diffusers(config)))
    assert written["_class_name"] == "SD3Transformer2DModel"
    assert config_from_diffusers(Published(written)) == config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("patch_size", 1, "patch_size is 1; must be 2$"),
        ("out_channels", 32, "out_channels is 32; must be null, or in_channels 16"),
        ("caption_projection_dim", 1152, "caption_projection_dim is 1152; must be .* 1536$"),
        ("qk_norm", None, 'qk_norm is null; must be "rms_norm"'),
        (
            "dual_attention_layers",
            [1, 2],
            r"dual_attention_layers is \[1, 2\]; must be the numbers from 0 on, in order",
        ),
        ("dual_attention_layers", 13, "dual_attention_layers is 13; must be the numbers"),
        ("dual_attention_layers", [False], r"dual_attention_layers is \[false\]; must be the numbers"),
        ("dual_attention_layers", list(range(24)), "dual_attention_layers is .*; must be fewer than num_layers 24"),
        ("pos_embed_max_size", 4097, "pos_embed_max_size is 4097; must be a positive integer up to 4096"),
        ("guidance_embeds", True, "unknown guidance_embeds; this kind of model has sample_size, patch_size"),
    ],
)
def test_configs_of_other_models_are_refused(key, value, message):
    with pytest.raises(UserError, match=rf"^config\.json: {message}"):
        config_from_diffusers(Published({**PUBLISHED_MEDIUM, key: value}))


def test_sd3_itself_is_refused():
    """It has no norm of queries and keys, and its file does not say so."""
    silent = {key: value for key, value in PUBLISHED_MEDIUM.items() if key != "qk_norm"}
    with pytest.raises(UserError, match="qk_norm is null"):
        config_from_diffusers(Published(silent))
