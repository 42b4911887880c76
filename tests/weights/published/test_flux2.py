"""Both published formats of FLUX.2, complete and exact, and the config.json of one of them."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.flux2 import Flux2, Flux2Config
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.published.flux2 import config_from_diffusers, config_to_diffusers, flux2_layout
from tests.layouts import import_tensors
from tests.models.test_flux2 import DEV, KLEIN_9B

GOLDEN = Path(__file__).parents[2] / "golden" / "flux2_klein_4b_shapes.json"
SMALL = Flux2Config(
    in_channels=4, num_double_blocks=2, num_single_blocks=3, num_heads=2, head_dim=8, text_dim=6, guidance_embed=True,
    axes_dims=(2, 2, 2, 2), theta=100.0, mlp_ratio=2,
)  # fmt: skip
FORMATS = ("diffusers", "bfl")
COUNTS = [(Flux2Config(), (169, 149)), (KLEIN_9B, (233, 201)), (DEV, (331, 299))]


def template(config):
    """Shapes of the parameter tree."""
    arrays = (
        jnp.zeros((1, 1, config.in_channels)), jnp.ones(1), jnp.zeros((1, 1, config.text_dim)),
        jnp.ones(1) if config.guidance_embed else None,
    )  # fmt: skip
    return jax.eval_shape(lambda: Flux2(config).init(jax.random.key(0), *arrays, grid=(1, 1)))["params"]


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), template(config))


def test_every_published_tensor_by_name_and_shape():
    published = {name: tuple(shape) for name, shape in json.loads(GOLDEN.read_text()).items()}
    assert published_shapes(flux2_layout(Flux2Config(), "diffusers"), template(Flux2Config())) == published


def test_names_and_shapes_of_black_forest_labs():
    shapes = published_shapes(flux2_layout(DEV, "bfl"), template(DEV))
    expected = {
        "img_in.weight": (6144, 128),
        "txt_in.weight": (6144, 15360),
        "time_in.in_layer.weight": (6144, 256),
        "guidance_in.out_layer.weight": (6144, 6144),
        "double_stream_modulation_img.lin.weight": (36864, 6144),
        "double_stream_modulation_txt.lin.weight": (36864, 6144),
        "single_stream_modulation.lin.weight": (18432, 6144),
        "double_blocks.7.img_attn.qkv.weight": (18432, 6144),
        "double_blocks.7.txt_attn.norm.key_norm.scale": (128,),
        "double_blocks.7.txt_mlp.0.weight": (36864, 6144),
        "double_blocks.7.img_mlp.2.weight": (6144, 18432),
        "single_blocks.47.linear1.weight": (55296, 6144),
        "single_blocks.47.linear2.weight": (6144, 24576),
        "single_blocks.47.norm.query_norm.scale": (128,),
        "final_layer.adaLN_modulation.1.weight": (12288, 6144),
        "final_layer.linear.weight": (128, 6144),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert not any(name.endswith("bias") for name in shapes)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("config", "counts"), COUNTS, ids=["klein-4B", "klein-9B", "dev"])
def test_every_number_of_our_tree_is_held_once(fmt, config, counts):
    flat = flatten_dict(template(config), sep="/")
    layout = flux2_layout(config, fmt)
    assert len(layout) == len({e.name for e in layout}) == counts[FORMATS.index(fmt)]
    held = [leaf for e in layout for leaf in e.leaves]
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
    layout = flux2_layout(SMALL, fmt)
    tensors = dict(export_tensors(layout, params))
    assert {name: tensor.shape for name, tensor in tensors.items()} == published_shapes(layout, params)
    chex.assert_trees_all_equal(import_tensors(layout, tensors, template(SMALL)), params)


def test_both_formats_hold_the_same_model():
    """The rules by which diffusers' names and rows become BFL's, stated a second time."""
    params = random_params(SMALL)
    ours, theirs = (dict(export_tensors(flux2_layout(SMALL, fmt), params)) for fmt in FORMATS)
    rows = [ours[f"transformer_blocks.1.attn.{name}.weight"] for name in ("add_q_proj", "add_k_proj", "add_v_proj")]
    np.testing.assert_array_equal(theirs["double_blocks.1.txt_attn.qkv.weight"], np.concatenate(rows))
    scale, shift = np.split(ours["norm_out.linear.weight"], 2)
    np.testing.assert_array_equal(theirs["final_layer.adaLN_modulation.1.weight"], np.concatenate([shift, scale]))
    for name, other in (
        ("single_transformer_blocks.2.attn.to_qkv_mlp_proj", "single_blocks.2.linear1"),
        ("single_transformer_blocks.2.attn.to_out", "single_blocks.2.linear2"),
        ("transformer_blocks.1.ff.linear_in", "double_blocks.1.img_mlp.0"),
        ("double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin"),
    ):
        np.testing.assert_array_equal(ours[f"{name}.weight"], theirs[f"{other}.weight"])


PUBLISHED_DEV = {
    "_class_name": "Flux2Transformer2DModel", "_diffusers_version": "0.36.0.dev0", "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32], "eps": 1e-06, "in_channels": 128, "joint_attention_dim": 15360,
    "mlp_ratio": 3.0, "num_attention_heads": 48, "num_layers": 8, "num_single_layers": 48, "out_channels": None,
    "patch_size": 1, "rope_theta": 2000, "timestep_guidance_channels": 256,
}  # fmt: skip
PUBLISHED_KLEIN = {
    **PUBLISHED_DEV, "guidance_embeds": False, "num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20,
    "joint_attention_dim": 7680,
}  # fmt: skip


def test_published_configs():
    assert config_from_diffusers(Published(PUBLISHED_DEV)) == DEV
    assert config_from_diffusers(Published(PUBLISHED_KLEIN)) == Flux2Config()
    assert config_from_diffusers(Published({**PUBLISHED_KLEIN, "out_channels": 128})) == Flux2Config()


@pytest.mark.parametrize("config", [Flux2Config(), DEV, SMALL], ids=["klein-4B", "dev", "small"])
def test_config_there_and_back(config):
    written = json.loads(json.dumps(config_to_diffusers(config)))
    assert written["_class_name"] == "Flux2Transformer2DModel"
    assert config_from_diffusers(Published(written)) == config


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("patch_size", 2, "patch_size is 2; must be 1$"),
        ("out_channels", 32, "out_channels is 32; must be null, or in_channels 128"),
        ("axes_dims_rope", [32, 32, 32, 16], r"axes_dims_rope is \[32.*attention_head_dim 128"),
        ("axes_dims_rope", [16, 56, 56], r"axes_dims_rope is \[16, 56, 56\]; must be a list of 4"),
        ("timestep_guidance_channels", 128, "timestep_guidance_channels is 128; must be 256"),
        ("mlp_ratio", 2.5, "mlp_ratio is 2.5; must be a positive, whole number"),
        ("mlp_ratio", 1e300, "mlp_ratio is 1e.300; must be"),
        ("rope_theta", 0, "rope_theta is 0; must be a positive"),
        ("eps", 1e-5, "eps is 1e-05; must be 1e-06"),
        ("guidance_embeds", 1, "guidance_embeds is 1; must be true or false"),
        ("pooled_projection_dim", 768, "unknown pooled_projection_dim"),
    ],
)
def test_configs_of_other_models_are_refused(key, value, message):
    with pytest.raises(UserError, match=message) as error:
        config_from_diffusers(Published({**PUBLISHED_KLEIN, key: value}))
    assert "\n" not in str(error.value)
