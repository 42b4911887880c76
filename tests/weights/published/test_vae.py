"""The decoder's files: tables complete at the published size and the same both ways; its config.json."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.vae import VaeConfig
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.files import open_tensors
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.load import load_params
from egrpo_jax.weights.published.vae import FLUX2_KEYS, IGNORED, KEYS, config_from_diffusers, vae_layout
from tests import tiny_flux
from tests.layouts import import_tensors
from tests.models.test_vae import SMALL_DECODER, decoder_shapes
from tests.oracle.random_weights import random_tensors
from tests.oracle.vae import FLUX2

GOLDEN = Path(__file__).parents[2] / "golden" / "flux_vae_shapes.json"
FLUX2_GOLDEN = Path(__file__).parents[2] / "golden" / "flux2_vae_shapes.json"
SMALL = VaeConfig(block_out_channels=(4, 8, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2)
PUBLISHED = {
    "_class_name": "AutoencoderKL", "_diffusers_version": "0.30.0.dev0", "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True,
    "in_channels": 3, "latent_channels": 16, "latents_mean": None, "latents_std": None, "layers_per_block": 2,
    "mid_block_add_attention": True, "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False, "use_quant_conv": False,
}  # fmt: skip


SMALL_FLUX2 = dataclasses.replace(SMALL, use_post_quant_conv=True, batch_norm_eps=1e-4)
PUBLISHED_FLUX2 = {
    "_class_name": "AutoencoderKLFlux2", "_diffusers_version": "0.36.0.dev0", "act_fn": "silu",
    "batch_norm_eps": 1e-4, "batch_norm_momentum": 0.1, "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "force_upcast": True, "in_channels": 3, "latent_channels": 32,
    "layers_per_block": 2, "mid_block_add_attention": True, "norm_num_groups": 32, "out_channels": 3,
    "patch_size": [2, 2], "sample_size": 1024, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": True, "use_quant_conv": True,
}  # fmt: skip


@pytest.mark.parametrize("fmt", ["diffusers", "bfl"])
@pytest.mark.parametrize(("config", "count"), [(VaeConfig(), 138), (FLUX2, 142)], ids=["flux", "flux2"])
def test_every_parameter_of_the_published_size_is_in_one_tensor(fmt, config, count):
    layout = vae_layout(config, fmt)
    paths = [leaf.path for e in layout for leaf in e.leaves]
    assert len(set(paths)) == len(paths) == len({e.name for e in layout}) == count
    assert set(paths) == set(flatten_dict(decoder_shapes(config), sep="/"))


def test_names_and_shapes_of_diffusers():
    golden = {name: tuple(shape) for name, shape in json.loads(GOLDEN.read_text()).items()}
    shapes = published_shapes(vae_layout(VaeConfig(), "diffusers"), decoder_shapes(VaeConfig()))
    assert shapes == {name: shape for name, shape in golden.items() if name.startswith("decoder.")}
    assert shapes | tiny_flux.encoder_shapes(VaeConfig()) == golden  # the miniature has all that a published file has


def test_names_and_shapes_of_diffusers_flux2():
    """All 251: read, or ignored, and then by one pattern."""
    golden = {name: tuple(shape) for name, shape in json.loads(FLUX2_GOLDEN.read_text()).items()}
    shapes = published_shapes(vae_layout(FLUX2, "diffusers"), decoder_shapes(FLUX2))
    ignored = {name: [pattern for pattern in IGNORED if re.fullmatch(pattern, name)] for name in golden}
    assert shapes == {name: shape for name, shape in golden.items() if not ignored[name]}
    assert sorted(len(patterns) for patterns in ignored.values()) == [0] * 142 + [1] * 109
    assert {pattern for patterns in ignored.values() for pattern in patterns} == set(IGNORED)


def test_names_of_black_forest_labs_flux2():
    """As FLUX.1's, and those of what is new: the layer is the decoder's, the statistics lie beside it."""
    flux, flux2 = (
        published_shapes(vae_layout(config, "bfl"), decoder_shapes(config)) for config in (VaeConfig(), FLUX2)
    )
    assert {name: shape for name, shape in flux2.items() if name not in flux} == {
        "decoder.post_quant_conv.weight": (32, 32, 1, 1),
        "decoder.post_quant_conv.bias": (32,),
        "bn.running_mean": (128,),
        "bn.running_var": (128,),
    }
    changed = {name: flux2[name] for name, shape in flux.items() if flux2[name] != shape}
    assert changed == {"decoder.conv_in.weight": (512, 32, 3, 3)}


def test_a_file_with_an_encoder_is_read(tmp_path):
    """In bfloat16, as published, with a count of batches that is an integer."""
    layout, shapes = vae_layout(SMALL_FLUX2, "diffusers"), decoder_shapes(SMALL_FLUX2)
    tensors = random_tensors(published_shapes(layout, shapes))
    halved = {name: np.ascontiguousarray(tensor, jnp.bfloat16) for name, tensor in tensors.items()}
    others = {"encoder.conv_in.bias": np.zeros(4), "quant_conv.bias": np.zeros(4)}
    others |= {"bn.num_batches_tracked": np.array(7, np.int64)}
    save_file(halved | others, tmp_path / "vae.safetensors")
    params = load_params(open_tensors(tmp_path), layout, shapes, IGNORED)
    np.testing.assert_array_equal(params["latent_variance"], halved["bn.running_var"].astype(np.float32))
    np.testing.assert_array_equal(
        params["decoder"]["post_quant"]["kernel"], halved["post_quant_conv.weight"][:, :, 0, 0].T.astype(np.float32)
    )
    with pytest.raises(UserError, match=r"quant_conv\.bias"):
        load_params(open_tensors(tmp_path), layout, shapes, IGNORED[:1])


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
@pytest.mark.parametrize("config", [SMALL, SMALL_FLUX2], ids=["flux", "flux2"])
def test_round_trip(fmt, config):
    params, layout = decoder_shapes(config), vae_layout(config, fmt)
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


def test_published_configs_of_flux2():
    assert {key for key in PUBLISHED_FLUX2 if key[0] != "_"} | {"decoder_block_out_channels"} == FLUX2_KEYS.keys()
    assert config_from_diffusers(Published(PUBLISHED_FLUX2)) == FLUX2
    assert config_from_diffusers(Published({"_class_name": "AutoencoderKLFlux2"})) == FLUX2
    small = {**PUBLISHED_FLUX2, "decoder_block_out_channels": [96, 192, 384, 384]}
    assert config_from_diffusers(Published(small)) == SMALL_DECODER
    assert not config_from_diffusers(Published({**small, "use_post_quant_conv": False})).use_post_quant_conv


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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scaling_factor", 0.3611, "unknown scaling_factor"),
        ("mid_block_add_attention", False, "mid_block_add_attention is false; must be true"),
        ("patch_size", [1, 1], r"patch_size is \[1, 1\]; must be a list of 2, each 2"),
        ("batch_norm_eps", 0, "batch_norm_eps is 0; must be a positive"),
        ("use_post_quant_conv", None, "use_post_quant_conv is null; must be true or false"),
        ("up_block_types", ["UpDecoderBlock2D"] * 3, "up_block_types is"),
        ("decoder_block_out_channels", [96, 192], r"decoder_block_out_channels is \[96, 192\]; must be 4 long"),
        ("decoder_block_out_channels", [96, 192, 384, 400], r"norm_num_groups is 32; .* of decoder_block_out_channels"),
    ],
)
def test_configs_of_other_flux2_autoencoders_are_refused(key, value, message):
    with pytest.raises(UserError, match=message) as error:
        config_from_diffusers(Published({**PUBLISHED_FLUX2, key: value}))
    assert "\n" not in str(error.value)


def test_absent_keys_mean_what_they_mean_to_diffusers():
    with pytest.raises(UserError, match="use_post_quant_conv is true"):
        config_from_diffusers(Published({}))
