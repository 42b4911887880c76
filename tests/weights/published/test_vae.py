"""The decoder's files: tables complete at the published size and the same both ways; its config.json."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.vae import VaeConfig
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.published.vae import KEYS, config_from_diffusers, vae_layout
from tests import tiny_flux
from tests.layouts import import_tensors
from tests.models.test_vae import decoder_shapes
from tests.oracle.random_weights import random_tensors

GOLDEN = Path(__file__).parents[2] / "golden" / "flux_vae_shapes.json"
SMALL = VaeConfig(block_out_channels=(4, 8, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2)
PUBLISHED = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0.dev0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True,
    "in_channels": 3, "latent_channels": 16, "latents_mean": None, "latents_std": None, "layers_per_block": 2,
    "mid_block_add_attention": True, "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False, "use_quant_conv": False,
}  # fmt: skip


@pytest.mark.parametrize("fmt", ["diffusers", "bfl"])
def test_every_parameter_of_the_published_size_is_in_one_tensor(fmt):
    layout = vae_layout(VaeConfig(), fmt)
    paths = [leaf.path for e in layout for leaf in e.leaves]
    assert len(set(paths)) == len(paths) == len({e.name for e in layout}) == 138
    assert set(paths) == set(flatten_dict(decoder_shapes(VaeConfig()), sep="/"))


def test_names_and_shapes_of_diffusers():
    golden = {name: tuple(shape) for name, shape in json.loads(GOLDEN.read_text()).items()}
    shapes = published_shapes(vae_layout(VaeConfig(), "diffusers"), decoder_shapes(VaeConfig()))
    assert shapes == {name: shape for name, shape in golden.items() if name.startswith("decoder.")}
    assert shapes | tiny_flux.encoder_shapes(VaeConfig()) == golden  # the miniature has all that a published file has


def test_names_and_shapes_of_black_forest_labs():
    """Where `ae.safetensors` differs: levels of the decoder count downwards, attention is made of 1x1 convolutions."""
    shapes = published_shapes(vae_layout(VaeConfig(), "bfl"), decoder_shapes(VaeConfig()))
    expected = {
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.mid.block_2.conv2.bias": (512,),
        "decoder.mid.attn_1.norm.weight": (512,),
        "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "decoder.up.3.block.2.conv1.weight": (512, 512, 3, 3),
        "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.norm_out.weight": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert not any(name.startswith("decoder.up.0.upsample") for name in shapes)


@pytest.mark.parametrize("fmt", ["diffusers", "bfl"])
def test_round_trip(fmt):
    params, layout = decoder_shapes(SMALL), vae_layout(SMALL, fmt)
    tensors = random_tensors(published_shapes(layout, params))
    ours = import_tensors(layout, tensors, params)
    assert jax.tree.map(np.shape, ours) == jax.tree.map(np.shape, params)
    exported = dict(export_tensors(layout, ours))
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor)


def test_published_configs():
    assert {key for key in PUBLISHED if not key.startswith("_")} == KEYS.keys()
    assert config_from_diffusers(Published(PUBLISHED)) == VaeConfig()
    sd35 = {**PUBLISHED, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    assert config_from_diffusers(Published(sd35)) == VaeConfig(scaling_factor=1.5305, shift_factor=0.0609)
    assert config_from_diffusers(Published({**PUBLISHED, "shift_factor": None})).shift_factor == 0.0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_quant_conv", True, "use_quant_conv is true; must be false"),
        ("mid_block_add_attention", False, "mid_block_add_attention is false; must be true"),
        ("latents_mean", [0.0] * 16, r"latents_mean is \[0.0, .*; must be null"),
        ("down_block_types", ["DownEncoderBlock2D"] * 3, "down_block_types is"),
        ("up_block_types", ["AttnUpDecoderBlock2D"] * 4, r'up_block_types is \["AttnUp'),
        ("norm_num_groups", 48, r"norm_num_groups is 48; must be a divisor of each of block_out_channels \[128"),
    ],
)
def test_configs_of_other_models_are_refused(key, value, message):
    with pytest.raises(UserError, match=message) as error:
        config_from_diffusers(Published({**PUBLISHED, key: value}))
    assert "\n" not in str(error.value)


def test_absent_keys_mean_what_they_mean_to_diffusers():
    with pytest.raises(UserError, match="use_post_quant_conv is true"):
        config_from_diffusers(Published({}))
