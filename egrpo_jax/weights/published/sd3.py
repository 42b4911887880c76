"""SD3.5 transformers as they are published: the tensors of diffusers' layout, and its config.json.

It is the layout of Hugging Face repositories (`transformer/*.safetensors`). The halves of the modulations that have
two are (scale, shift) there, (shift, scale) here; the channels that leave the model are in order of a patch's places.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from egrpo_jax.models.sd3 import Sd3Config
from egrpo_jax.weights.configs import LARGEST, SIZE, Key, Kind, Published, nullable, one_of
from egrpo_jax.weights.layout import (
    LINEAR_PATCH_ROWS,
    LINEAR_SWAPPED,
    PATCH_CONV,
    PATCH_ROWS,
    SQUEEZED,
    SWAPPED,
    Layout,
    entry,
    for_layers,
    linear,
)

Format = Literal["diffusers"]
Names = tuple[tuple[str, str], ...]
"""Ours and diffusers'."""

CLASS_NAME = "SD3Transformer2DModel"
SAMPLE_SIZE = 128
"""The side of latents that the published table of positions was made for; it counts for nothing else."""

_COUNT = Kind(
    "the numbers from 0 on, in order",
    lambda value: isinstance(value, list | tuple) and all(one_of(i).fits(item) for i, item in enumerate(value)),
)
_SIDE = Kind("a positive integer up to 4096", lambda value: SIZE.fits(value) and value**2 <= LARGEST)
KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "sample_size": Key(SIZE, SAMPLE_SIZE),
        "patch_size": Key(one_of(2), 2),
        "in_channels": Key(SIZE, 16),
        "out_channels": Key(nullable(SIZE), 16),
        "num_layers": Key(SIZE, 18),
        "attention_head_dim": Key(SIZE, 64),
        "num_attention_heads": Key(SIZE, 18),
        "joint_attention_dim": Key(SIZE, 4096),
        "caption_projection_dim": Key(SIZE, 1152),
        "pooled_projection_dim": Key(SIZE, 2048),
        "pos_embed_max_size": Key(_SIDE, 96),
        "dual_attention_layers": Key(_COUNT, ()),
        "qk_norm": Key(one_of("rms_norm"), None),  # SD3 has none
    }
)
"""The keys of config.json; many defaults are not what SD3.5 has."""

_TOP: Names = (
    ("text_in", "context_embedder"),
    ("time_in/linear_1", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in/linear_2", "time_text_embed.timestep_embedder.linear_2"),
    ("pooled_in/linear_1", "time_text_embed.text_embedder.linear_1"),
    ("pooled_in/linear_2", "time_text_embed.text_embedder.linear_2"),
)
_BLOCK: Names = (
    ("image_modulation/linear", "norm1.linear"),
    ("image_qkv/to_q", "attn.to_q"),
    ("image_qkv/to_k", "attn.to_k"),
    ("image_qkv/to_v", "attn.to_v"),
    ("text_qkv/to_q", "attn.add_q_proj"),
    ("text_qkv/to_k", "attn.add_k_proj"),
    ("text_qkv/to_v", "attn.add_v_proj"),
    ("image_out", "attn.to_out.0"),
    ("image_ff/linear_1", "ff.net.0.proj"),
    ("image_ff/linear_2", "ff.net.2"),
)
_SCALES: Names = (
    ("image_qkv/norm_q/scale", "attn.norm_q.weight"),
    ("image_qkv/norm_k/scale", "attn.norm_k.weight"),
    ("text_qkv/norm_q/scale", "attn.norm_added_q.weight"),
    ("text_qkv/norm_k/scale", "attn.norm_added_k.weight"),
)
_TEXT: Names = (
    ("text_modulation/linear", "norm1_context.linear"),
    ("text_out", "attn.to_add_out"),
    ("text_ff/linear_1", "ff_context.net.0.proj"),
    ("text_ff/linear_2", "ff_context.net.2"),
)
_DUAL: Names = (
    ("self_qkv/to_q", "attn2.to_q"),
    ("self_qkv/to_k", "attn2.to_k"),
    ("self_qkv/to_v", "attn2.to_v"),
    ("self_out", "attn2.to_out.0"),
)
_DUAL_SCALES: Names = (
    ("self_qkv/norm_q/scale", "attn2.norm_q.weight"),
    ("self_qkv/norm_k/scale", "attn2.norm_k.weight"),
)


def sd3_layout(config: Sd3Config, fmt: Format = "diffusers") -> Layout:
    """All tensors of an SD3.5 checkpoint of this size: 909 for Medium, 1227 for Large."""
    del fmt  # there is one; layouts of all families are called alike
    prefix, dual = "transformer_blocks.{}.", config.num_dual_blocks
    last_modulation = _swapped(f"{prefix}norm1_context.linear", "last_blocks/text_modulation/linear")
    return (
        entry("pos_embed.pos_embed", "positions", form=SQUEEZED),
        entry("pos_embed.proj.weight", "image_in/kernel", form=PATCH_CONV),
        entry("pos_embed.proj.bias", "image_in/bias"),
        *_named(_TOP),
        *for_layers(dual, _named(_BLOCK + _TEXT + _DUAL, _SCALES + _DUAL_SCALES, "dual_blocks/", prefix)),
        *for_layers(config.num_plain_blocks, _named(_BLOCK + _TEXT, _SCALES, "plain_blocks/", prefix), first=dual),
        *for_layers(1, (*_named(_BLOCK, _SCALES, "last_blocks/", prefix), *last_modulation), config.num_blocks - 1),
        *_swapped("norm_out.linear", "final_modulation/linear"),
        entry("proj_out.weight", "final/kernel", form=LINEAR_PATCH_ROWS),
        entry("proj_out.bias", "final/bias", form=PATCH_ROWS),
    )


def _named(linears: Names, scales: Names = (), folder: str = "", prefix: str = "") -> Layout:
    """The tensors of `linears` and `scales`: `folder` stands before our paths, `prefix` before diffusers' names."""
    return (
        *(e for ours, theirs in linears for e in linear(prefix + theirs, folder + ours)),
        *(entry(prefix + theirs, folder + ours) for ours, theirs in scales),
    )


def _swapped(name: str, path: str) -> Layout:
    return (
        entry(f"{name}.weight", f"{path}/kernel", form=LINEAR_SWAPPED),
        entry(f"{name}.bias", f"{path}/bias", form=SWAPPED),
    )


def config_from_diffusers(published: Published) -> Sd3Config:
    """The sizes that a config.json of an `SD3Transformer2DModel` names.

    Raises:
      UserError: an unknown key, or a value that no SD3.5 transformer has.
    """
    keys = published.checked(KEYS, strict=True)
    width = keys["num_attention_heads"] * keys["attention_head_dim"]
    if keys["out_channels"] not in (None, keys["in_channels"]):
        raise keys.error("out_channels", f"null, or in_channels {keys['in_channels']}: a velocity is as its latents")
    if keys["caption_projection_dim"] != width:
        raise keys.error("caption_projection_dim", f"num_attention_heads times attention_head_dim, {width}")
    if len(keys["dual_attention_layers"]) >= keys["num_layers"]:
        raise keys.error("dual_attention_layers", f"fewer than num_layers {keys['num_layers']}: the last is not dual")
    return Sd3Config(
        in_channels=4 * keys["in_channels"],
        num_blocks=keys["num_layers"],
        num_dual_blocks=len(keys["dual_attention_layers"]),
        num_heads=keys["num_attention_heads"],
        head_dim=keys["attention_head_dim"],
        text_dim=keys["joint_attention_dim"],
        pooled_dim=keys["pooled_projection_dim"],
        max_grid=keys["pos_embed_max_size"],
    )


def config_to_diffusers(config: Sd3Config) -> dict[str, Any]:
    """The content of config.json for `config`, `_class_name` included."""
    return {
        "_class_name": CLASS_NAME,
        "sample_size": SAMPLE_SIZE,
        "patch_size": 2,
        "in_channels": config.in_channels // 4,
        "out_channels": config.in_channels // 4,
        "num_layers": config.num_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.text_dim,
        "caption_projection_dim": config.width,
        "pooled_projection_dim": config.pooled_dim,
        "pos_embed_max_size": config.max_grid,
        "dual_attention_layers": list(range(config.num_dual_blocks)),
        "qk_norm": "rms_norm",
    }
