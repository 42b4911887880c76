"""Both published formats of Z-Image, complete and exact, and the config.json of one of them."""

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
from egrpo_jax.models.z_image import ZImage, ZImageConfig
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.published.z_image import (
    IGNORED,
    PREFIX,
    config_from_diffusers,
    config_to_diffusers,
    z_image_layout,
)
from tests.layouts import import_tensors

GOLDEN = Path(__file__).parents[2] / "golden" / "z_image_shapes.json"
SMALL = ZImageConfig(
    in_channels=12, num_layers=3, num_refiner_layers=2, num_heads=2, head_dim=8, text_dim=6, axes_dims=(2, 2, 4),
    axes_lens=(64, 5, 6), theta=100.0, epsilon=1e-6,
)  # fmt: skip
FORMATS = ("diffusers", "original")
STACKS = ("noise_refiner/", "context_refiner/", "layers/")


def template(config):
    """Shapes of the parameter tree."""
    arrays = (
        jnp.zeros((1, 1, config.in_channels)), jnp.ones(1), jnp.zeros((1, 1, config.text_dim)), jnp.ones(1, jnp.int32)
    )  # fmt: skip
    return jax.eval_shape(lambda: ZImage(config).init(jax.random.key(0), *arrays, grid=(1, 1)))["params"]


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), template(config))


def original_shapes(published):
    """The rules by which diffusers' names become those of single files, stated a second time."""
    renamed = {}
    for name, shape in published.items():
        name = re.sub(r"^all_(x_embedder|final_layer)\.2-1\.", r"\1.", name)
        name = re.sub(r"\.attention\.norm_([qk])\.", r".attention.\1_norm.", name)
        name = name.replace(".attention.to_out.0.", ".attention.out.")
        if ".attention.to_q." in name:
            name, shape = name.replace("to_q", "qkv"), (3 * shape[0], *shape[1:])
        renamed[name] = shape
    return {name: shape for name, shape in renamed.items() if not re.search(r"\.to_[kv]\.", name)}


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_published_tensor_by_name_and_shape(fmt, prefix):
    published = {name: tuple(shape) for name, shape in json.loads(GOLDEN.read_text()).items()}
    expected = published if fmt == "diffusers" else original_shapes(published)
    layout = z_image_layout(ZImageConfig(), fmt, prefix)
    assert len(layout) == len({e.name for e in layout}) == {"diffusers": 521, "original": 453}[fmt]
    assert published_shapes(layout, template(ZImageConfig())) == {prefix + name: s for name, s in expected.items()}


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_number_of_our_tree_is_held_once(fmt):
    flat = flatten_dict(template(ZImageConfig()), sep="/")
    held = [leaf for e in z_image_layout(ZImageConfig(), fmt) for leaf in e.leaves]
    expected = {
        (path, layer)
        for path, leaf in flat.items()
        for layer in (range(leaf.shape[0]) if path.startswith(STACKS) else [None])
    }
    assert len(held) == len(expected)
    assert {(leaf.path, leaf.layer) for leaf in held} == expected


@pytest.mark.parametrize("fmt", FORMATS)
def test_export_then_import_changes_nothing(fmt):
    params = random_params(SMALL)
    layout = z_image_layout(SMALL, fmt)
    tensors = dict(export_tensors(layout, params))
    assert {name: tensor.shape for name, tensor in tensors.items()} == published_shapes(layout, params)
    chex.assert_trees_all_equal(import_tensors(layout, tensors, template(SMALL)), params)


def test_both_formats_hold_the_same_model():
    params = random_params(SMALL)
    ours, theirs = (dict(export_tensors(z_image_layout(SMALL, fmt), params)) for fmt in FORMATS)
    for stack in STACKS:
        block = f"{stack[:-1]}.1.attention."
        rows = [ours[f"{block}to_{name}.weight"] for name in "qkv"]
        np.testing.assert_array_equal(theirs[f"{block}qkv.weight"], np.concatenate(rows))
        np.testing.assert_array_equal(theirs[f"{block}k_norm.weight"], ours[f"{block}norm_k.weight"])
    chex.assert_trees_all_equal(
        *(import_tensors(z_image_layout(SMALL, fmt), t, params) for fmt, t in zip(FORMATS, (ours, theirs), strict=True))
    )


def test_patches_are_in_the_order_of_channel_row_column_here():
    """And of row, column, channel in files: column and row 3 (2 i + j) + c there is 4 c + 2 i + j here."""
    params = random_params(SMALL)
    tensors = dict(export_tensors(z_image_layout(SMALL, "diffusers"), params))
    embedder, final = "all_x_embedder.2-1", "all_final_layer.2-1.linear"
    for channel in range(3):
        for place in range(4):
            theirs, ours = 3 * place + channel, 4 * channel + place
            np.testing.assert_array_equal(tensors[f"{embedder}.weight"][:, theirs], params["image_in"]["kernel"][ours])
            np.testing.assert_array_equal(tensors[f"{final}.weight"][theirs], params["final"]["kernel"][:, ours])
            np.testing.assert_array_equal(tensors[f"{final}.bias"][theirs], params["final"]["bias"][ours])


def test_names_of_single_files():
    """Some hold a norm that nothing reads."""
    ignored = lambda name: any(re.fullmatch(pattern, name) for pattern in IGNORED)
    assert ignored("norm_final.weight")
    assert ignored("model.diffusion_model.norm_final.weight")
    assert not ignored("modelXdiffusion_model.norm_final.weight")
    assert not ignored("layers.0.norm_final.weight")


PUBLISHED = {
    "_class_name": "ZImageTransformer2DModel", "_diffusers_version": "0.36.0.dev0", "all_f_patch_size": [1],
    "all_patch_size": [2], "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "cap_feat_dim": 2560, "dim": 3840,
    "in_channels": 16, "n_heads": 30, "n_kv_heads": 30, "n_layers": 30, "n_refiner_layers": 2, "norm_eps": 1e-05,
    "qk_norm": True, "rope_theta": 256.0, "siglip_feat_dim": None, "t_scale": 1000.0,
}  # fmt: skip


def test_published_config():
    assert config_from_diffusers(Published(PUBLISHED)) == ZImageConfig()
    older = {key: value for key, value in PUBLISHED.items() if key != "siglip_feat_dim"}
    assert config_from_diffusers(Published(older)) == ZImageConfig()
    silent = config_from_diffusers(Published({"_class_name": "ZImageTransformer2DModel"}))
    assert silent == dataclasses.replace(ZImageConfig(), axes_lens=(1024, 512, 512))
    written = config_to_diffusers(ZImageConfig())
    assert written == {key: value for key, value in PUBLISHED.items() if key != "_diffusers_version"}


def test_config_there_and_back():
    written = json.loads(json.dumps(config_to_diffusers(SMALL)))
    assert config_from_diffusers(Published(written)) == SMALL


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("all_patch_size", [2, 4], r"all_patch_size is \[2, 4\]; must be \[2\]$"),
        ("all_f_patch_size", [2], r"all_f_patch_size is \[2\]; must be \[1\]$"),
        ("in_channels", 0, "in_channels is 0; must be a positive integer"),
        ("n_heads", 7, "n_heads is 7; must be a divisor of dim 3840"),
        ("n_kv_heads", 10, "n_kv_heads is 10; must be n_heads, 30"),
        ("qk_norm", False, "qk_norm is false; must be true"),
        ("siglip_feat_dim", 1152, "siglip_feat_dim is 1152; must be null"),
        ("t_scale", 1.0, "t_scale is 1.0; must be 1000.0"),
        ("norm_eps", 0, "norm_eps is 0; must be a positive, finite number"),
        ("axes_dims", [32, 48, 50], r"axes_dims is \[32, 48, 50\]; must be .* dim / n_heads, 128"),
        ("axes_lens", [1536, 512], r"axes_lens is \[1536, 512\]; must be a list of 3"),
        ("guidance_embeds", True, "unknown guidance_embeds"),
    ],
)
def test_configs_of_other_models_are_refused(key, value, message):
    with pytest.raises(UserError, match=message):
        config_from_diffusers(Published({**PUBLISHED, key: value}))
