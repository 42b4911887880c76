"""The autoencoders of FLUX.1, FLUX.2 and SD3.5 as they are published: their decoders' tensors in both file formats, and
diffusers' config.json.

`diffusers` is the layout of Hugging Face repositories (`vae/*.safetensors`), `bfl` that of `ae.safetensors`. BFL counts
the levels of the decoder from full resolution down, and makes attention of 1x1 convolutions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from egrpo_jax.models.vae import VaeConfig
from egrpo_jax.weights.configs import ANYTHING, FLAG, NUMBER, POSITIVE, SIZE, Key, Published, list_of, nullable, one_of
from egrpo_jax.weights.layout import CONV, LINEAR, POINT_CONV, Form, Layout, entry, norm

CLASS_NAME = "AutoencoderKL"
FLUX2_CLASS_NAME = "AutoencoderKLFlux2"
_BOTH: Mapping[str, Key] = {
    "act_fn": Key(one_of("silu"), "silu"),
    "force_upcast": Key(ANYTHING, True),
    "in_channels": Key(one_of(3), 3),
    "out_channels": Key(one_of(3), 3),
    "mid_block_add_attention": Key(one_of(True), True),
    "norm_num_groups": Key(SIZE, 32),
}
KEYS: Mapping[str, Key] = MappingProxyType(
    {
        **_BOTH,
        "block_out_channels": Key(list_of(SIZE), (64,)),
        "down_block_types": Key(list_of(one_of("DownEncoderBlock2D")), ("DownEncoderBlock2D",)),
        "up_block_types": Key(list_of(one_of("UpDecoderBlock2D")), ("UpDecoderBlock2D",)),
        "latent_channels": Key(SIZE, 4),
        "latents_mean": Key(one_of(None), None),
        "latents_std": Key(one_of(None), None),
        "layers_per_block": Key(SIZE, 1),
        "sample_size": Key(ANYTHING, 32),
        "scaling_factor": Key(POSITIVE, 0.18215),
        "shift_factor": Key(nullable(NUMBER), None),
        "use_post_quant_conv": Key(one_of(False), True),
        "use_quant_conv": Key(one_of(False), True),
    }
)
"""The keys of an `AutoencoderKL`; those that `VaeConfig` has no place for must say what FLUX.1's and SD3.5's say."""
FLUX2_KEYS: Mapping[str, Key] = MappingProxyType(
    {
        **_BOTH,
        "block_out_channels": Key(list_of(SIZE), (128, 256, 512, 512)),
        "decoder_block_out_channels": Key(nullable(list_of(SIZE)), None),
        "down_block_types": Key(list_of(one_of("DownEncoderBlock2D")), ("DownEncoderBlock2D",) * 4),
        "up_block_types": Key(list_of(one_of("UpDecoderBlock2D")), ("UpDecoderBlock2D",) * 4),
        "latent_channels": Key(SIZE, 32),
        "layers_per_block": Key(SIZE, 2),
        "sample_size": Key(ANYTHING, 1024),
        "use_post_quant_conv": Key(FLAG, True),
        "use_quant_conv": Key(FLAG, True),
        "batch_norm_eps": Key(POSITIVE, 1e-4),
        "batch_norm_momentum": Key(ANYTHING, 0.1),
        "patch_size": Key(list_of(one_of(2), 2), (2, 2)),
    }
)
"""The keys of an `AutoencoderKLFlux2`."""

IGNORED = (r"encoder\..*", r"quant_conv\..*", r"bn\.num_batches_tracked")
"""Tensors of published files that decoding needs not."""

Format = Literal["diffusers", "bfl"]


@dataclasses.dataclass(frozen=True)
class _Names:
    """A format's names of modules; '{}' is the number of a level, then that of a residual block.

    `attention_layers` are group norm, query, key, value and output, of which `attention_form` is the kernels'. All but
    `post_quant` are the decoder's.
    """

    up: str
    upsample: str
    up_counts_upwards: bool
    middle: tuple[str, str]
    attention: str
    attention_layers: tuple[str, str, str, str, str]
    attention_form: Form
    shortcut: str
    norm_out: str
    post_quant: str


_NAMES: dict[Format, _Names] = {
    "diffusers": _Names(
        up="up_blocks.{}.resnets.{}",
        upsample="up_blocks.{}.upsamplers.0.conv",
        up_counts_upwards=True,
        middle=("mid_block.resnets.0", "mid_block.resnets.1"),
        attention="mid_block.attentions.0",
        attention_layers=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
        attention_form=LINEAR,
        shortcut="conv_shortcut",
        norm_out="conv_norm_out",
        post_quant="post_quant_conv",
    ),
    "bfl": _Names(
        up="up.{}.block.{}",
        upsample="up.{}.upsample.conv",
        up_counts_upwards=False,
        middle=("mid.block_1", "mid.block_2"),
        attention="mid.attn_1",
        attention_layers=("norm", "q", "k", "v", "proj_out"),
        attention_form=POINT_CONV,
        shortcut="nin_shortcut",
        norm_out="norm_out",
        post_quant="decoder.post_quant_conv",
    ),
}


def vae_layout(config: VaeConfig, fmt: Format) -> Layout:
    """The tensors of the decoder, and the statistics of its latents where there are some.

    Args:
      config: sizes of the model.
      fmt: "diffusers" for `vae/diffusion_pytorch_model.safetensors`, "bfl" for `ae.safetensors`.
    """
    names = _NAMES[fmt]
    layout = tuple(
        dataclasses.replace(
            e,
            name=f"decoder.{e.name}",
            leaves=tuple(dataclasses.replace(leaf, path=f"decoder/{leaf.path}") for leaf in e.leaves),
        )
        for e in _decoder(config, names)
    )
    if config.use_post_quant_conv:
        layout += _kernel(names.post_quant, "decoder/post_quant", POINT_CONV)
    if config.batch_norm_eps is not None:
        layout += entry("bn.running_mean", "latent_mean"), entry("bn.running_var", "latent_variance")
    return layout


def _decoder(config: VaeConfig, names: _Names) -> Layout:
    levels = config.block_out_channels[::-1]
    layout = _kernel("conv_in", "conv_in", CONV) + _middle(names)
    channels = levels[0]
    for level, out in enumerate(levels):
        number = level if names.up_counts_upwards else len(levels) - 1 - level
        for index in range(config.layers_per_block + 1):
            layout += _resnet(names.up.format(number, index), f"up_{level}/resnet_{index}", channels != out, names)
            channels = out
        if level < len(levels) - 1:
            layout += _kernel(names.upsample.format(number), f"upsample_{level}", CONV)
    return layout + _output(names)


def _middle(names: _Names) -> Layout:
    before, *layers = names.attention_layers
    attention = norm(f"{names.attention}.{before}", "middle/attention/norm")
    for name, path in zip(layers, ("to_q", "to_k", "to_v", "out"), strict=True):
        attention += _kernel(f"{names.attention}.{name}", f"middle/attention/{path}", names.attention_form)
    first, second = (
        _resnet(name, f"middle/resnet_{index}", shortcut=False, names=names) for index, name in enumerate(names.middle)
    )
    return first + attention + second


def _resnet(name: str, path: str, shortcut: bool, names: _Names) -> Layout:
    layout: Layout = ()
    for number in (1, 2):
        layout += norm(f"{name}.norm{number}", f"{path}/norm_{number}")
        layout += _kernel(f"{name}.conv{number}", f"{path}/conv_{number}", CONV)
    return layout + (_kernel(f"{name}.{names.shortcut}", f"{path}/shortcut", POINT_CONV) if shortcut else ())


def _output(names: _Names) -> Layout:
    return norm(names.norm_out, "norm_out") + _kernel("conv_out", "conv_out", CONV)


def _kernel(name: str, path: str, form: Form) -> Layout:
    return entry(f"{name}.weight", f"{path}/kernel", form=form), entry(f"{name}.bias", f"{path}/bias")


def config_from_diffusers(published: Published) -> VaeConfig:
    """The sizes that a config.json names, of an `AutoencoderKLFlux2` if it says so, else of an `AutoencoderKL`.

    Raises:
      UserError: an unknown key, or a value that no autoencoder of this architecture (FLUX.1, FLUX.2, SD3.5) has.
    """
    if published.get("_class_name") == FLUX2_CLASS_NAME:
        keys = published.checked(FLUX2_KEYS, strict=True)
        width = "block_out_channels" if keys["decoder_block_out_channels"] is None else "decoder_block_out_channels"
        return _config(
            keys,
            width,
            scaling_factor=1.0,
            shift_factor=0.0,
            use_post_quant_conv=keys["use_post_quant_conv"],
            batch_norm_eps=keys["batch_norm_eps"],
        )
    keys = published.checked(KEYS, strict=True)
    scale = {"scaling_factor": keys["scaling_factor"], "shift_factor": keys["shift_factor"] or 0.0}
    return _config(keys, "block_out_channels", **scale)


def _config(keys: Published, widths: str, **others: Any) -> VaeConfig:
    """The sizes in `keys`, with the widths of the decoder under the key `widths`.

    Raises:
      UserError: lists that differ in length, or widths that the groups of norms do not divide.
    """
    levels, groups = keys["block_out_channels"], keys["norm_num_groups"]
    for key in ("down_block_types", "up_block_types", widths):
        if len(keys[key]) != len(levels):
            raise keys.error(key, f"{len(levels)} long, as block_out_channels {list(levels)}")
    if any(channels % groups for channels in keys[widths]):
        raise keys.error("norm_num_groups", f"a divisor of each of {widths} {list(keys[widths])}")
    return VaeConfig(
        block_out_channels=tuple(keys[widths]),
        layers_per_block=keys["layers_per_block"],
        latent_channels=keys["latent_channels"],
        norm_num_groups=groups,
        **others,
    )
