"""Both published formats of FLUX.1, complete and exact, and the config.json of one of them."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.flux import Flux, FluxConfig
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.published.flux import config_from_diffusers, config_to_diffusers, flux_layout
from tests.layouts import import_tensors

GOLDEN = Path(__file__).parents[2] / "golden"
SMALL = FluxConfig(
    in_channels=4, num_double_blocks=2, num_single_blocks=3, num_heads=2, head_dim=8, text_dim=6, pooled_dim=5,
    axes_dims=(2, 2, 4),
)  # fmt: skip
FORMATS = ("diffusers", "bfl")
QKV_MLP = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")


def template(config):
    """Shapes of the parameter tree."""
    arrays = (
        jnp.zeros((1, 1, config.in_channels)), jnp.ones(1), jnp.zeros((1, 1, config.text_dim)),
        jnp.zeros((1, config.pooled_dim)), jnp.ones(1) if config.guidance_embed else None,
    )  # fmt: skip
    return jax.eval_shape(lambda: Flux(config).init(jax.random.key(0), *arrays, grid=(1, 1)))["params"]


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), template(config))


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_published_tensor_by_name_and_shape(fmt, guidance):
    """FLUX.1-schnell is FLUX.1-dev without the four tensors of the guidance embedder."""
    file = {"diffusers": "flux1_dev_shapes.json", "bfl": "flux1_dev_bfl_shapes.json"}[fmt]
    published = {name: tuple(shape) for name, shape in json.loads((GOLDEN / file).read_text()).items()}
    if not guidance:
        published = {name: shape for name, shape in published.items() if "guidance" not in name}
    config = FluxConfig(guidance_embed=guidance)
    layout = flux_layout(config, fmt)
    assert len(layout) == len({e.name for e in layout}) == {"diffusers": 1156, "bfl": 776}[fmt] + 4 * guidance
    assert published_shapes(layout, template(config)) == published


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_number_of_our_tree_is_held_once(fmt, guidance):
    config = FluxConfig(guidance_embed=guidance)
    flat = flatten_dict(template(config), sep="/")
    held = [leaf for e in flux_layout(config, fmt) for leaf in e.leaves]
    expected = {
        (path, layer)
        for path, leaf in flat.items()
        for layer in (range(leaf.shape[0]) if "_blocks/" in path else [None])
    }
    assert len(held) == len(expected)
    assert {(leaf.path, leaf.layer) for leaf in held} == expected


@pytest.mark.parametrize("fmt", FORMATS)
def test_export_then_import_changes_nothing(fmt):
    params = random_params(SMALL)
    layout = flux_layout(SMALL, fmt)
    tensors = dict(export_tensors(layout, params))
    assert {name: tensor.shape for name, tensor in tensors.items()} == published_shapes(layout, params)
    chex.assert_trees_all_equal(import_tensors(layout, tensors, template(SMALL)), params)


def test_both_formats_hold_the_same_model():
    """The rules by which diffusers' names and rows become BFL's, stated a second time."""
    params = random_params(SMALL)
    ours, theirs = (dict(export_tensors(flux_layout(SMALL, fmt), params)) for fmt in FORMATS)
    for kind in ("weight", "bias"):
        rows = [ours[f"single_transformer_blocks.2.{name}.{kind}"] for name in QKV_MLP]
        np.testing.assert_array_equal(theirs[f"single_blocks.2.linear1.{kind}"], np.concatenate(rows))
        rows = [ours[f"transformer_blocks.1.attn.{name}.{kind}"] for name in ("add_q_proj", "add_k_proj", "add_v_proj")]
        np.testing.assert_array_equal(theirs[f"double_blocks.1.txt_attn.qkv.{kind}"], np.concatenate(rows))
        scale, shift = np.split(ours[f"norm_out.linear.{kind}"], 2)
        np.testing.assert_array_equal(theirs[f"final_layer.adaLN_modulation.1.{kind}"], np.concatenate([shift, scale]))
    chex.assert_trees_all_equal(
        *(import_tensors(flux_layout(SMALL, fmt), t, params) for fmt, t in zip(FORMATS, (ours, theirs), strict=True))
    )


PUBLISHED_DEV = {
    "_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0.dev0", "_name_or_path": "../checkpoints",
    "attention_head_dim": 128, "guidance_embeds": True, "in_channels": 64, "joint_attention_dim": 4096,
    "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38, "patch_size": 1,
    "pooled_projection_dim": 768,
}  # fmt: skip


def test_published_configs():
    assert config_from_diffusers(Published(PUBLISHED_DEV)) == FluxConfig()
    assert config_from_diffusers(Published({**PUBLISHED_DEV, "guidance_embeds": False})) == FluxConfig(
        guidance_embed=False
    )
    resaved = {**PUBLISHED_DEV, "axes_dims_rope": [16, 56, 56], "out_channels": None}
    assert (
        config_from_diffusers(Published(resaved))
        == config_from_diffusers(Published({**resaved, "out_channels": 64}))
        == FluxConfig()
    )


@pytest.mark.parametrize("config", [FluxConfig(), SMALL])
def test_config_there_and_back(config):
    written = json.loads(json.dumps(config_to_diffusers(config)))
    assert written["_class_name"] == "FluxTransformer2DModel"
    assert config_from_diffusers(Published(written)) == config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("patch_size", 2, "patch_size is 2; must be 1$"),
        ("out_channels", 32, "out_channels is 32; must be null, or in_channels 64"),
        ("axes_dims_rope", [16, 56, 32], r"axes_dims_rope is \[16, 56, 32\].*attention_head_dim 128"),
    ],
)
def test_configs_of_other_models_are_refused(key, value, message):
    with pytest.raises(UserError, match=message):
        config_from_diffusers(Published({**PUBLISHED_DEV, key: value}))


def test_what_diffusers_cannot_say_is_refused():
    with pytest.raises(UserError, match="theta 2000"):
        config_to_diffusers(FluxConfig(theta=2000))
