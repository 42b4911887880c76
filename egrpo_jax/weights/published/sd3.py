"""SD3.5 transformers as they are published: the tensors of both file formats, and diffusers' config.json.

`diffusers` is the layout of Hugging Face repositories (`transformer/*.safetensors`), `original` that of Stability's
single files, `sd3.5_medium.safetensors` and the like. The halves of the modulations that have two are (scale, shift) in
the one, (shift, scale) in the other and here; the channels that leave the model are in order of a patch's places.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from egrpo_jax.models.sd3 import Sd3Config
from egrpo_jax.weights.configs import LARGEST, SIZE, Key, Kind, Published, nullable, one_of
from egrpo_jax.weights.layout import (
    AS_IS,
    LINEAR_PATCH_ROWS,
    LINEAR_SWAPPED,
    PATCH_CONV,
    PATCH_ROWS,
    SQUEEZED,
    SWAPPED,
    Form,
    Layout,
    entry,
    for_layers,
    linear,
)
from egrpo_jax.weights.published.names import Names, scale, tensors

Format = Literal["diffusers", "original"]

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
    ("text_in", "context_embedder", "context_embedder"),
    ("time_in/linear_1", "time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_in/linear_2", "time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("pooled_in/linear_1", "time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
    ("pooled_in/linear_2", "time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
)
_BLOCK: Names = (
    ("image_modulation/linear", "norm1.linear", "x_block.adaLN_modulation.1"),
    ("image_qkv/to_q image_qkv/to_k image_qkv/to_v", "attn.to_q attn.to_k attn.to_v", "x_block.attn.qkv"),
    (
        "text_qkv/to_q text_qkv/to_k text_qkv/to_v",
        "attn.add_q_proj attn.add_k_proj attn.add_v_proj",
        "context_block.attn.qkv",
    ),
    ("image_out", "attn.to_out.0", "x_block.attn.proj"),
    ("image_ff/linear_1", "ff.net.0.proj", "x_block.mlp.fc1"),
    ("image_ff/linear_2", "ff.net.2", "x_block.mlp.fc2"),
)
_SCALES: Names = (
    ("image_qkv/norm_q/scale", "attn.norm_q.weight", "x_block.attn.ln_q.weight"),
    ("image_qkv/norm_k/scale", "attn.norm_k.weight", "x_block.attn.ln_k.weight"),
    ("text_qkv/norm_q/scale", "attn.norm_added_q.weight", "context_block.attn.ln_q.weight"),
    ("text_qkv/norm_k/scale", "attn.norm_added_k.weight", "context_block.attn.ln_k.weight"),
)
_TEXT: Names = (
    ("text_modulation/linear", "norm1_context.linear", "context_block.adaLN_modulation.1"),
    ("text_out", "attn.to_add_out", "context_block.attn.proj"),
    ("text_ff/linear_1", "ff_context.net.0.proj", "context_block.mlp.fc1"),
    ("text_ff/linear_2", "ff_context.net.2", "context_block.mlp.fc2"),
)
_DUAL: Names = (
    ("self_qkv/to_q self_qkv/to_k self_qkv/to_v", "attn2.to_q attn2.to_k attn2.to_v", "x_block.attn2.qkv"),
    ("self_out", "attn2.to_out.0", "x_block.attn2.proj"),
)
_DUAL_SCALES: Names = (
    ("self_qkv/norm_q/scale", "attn2.norm_q.weight", "x_block.attn2.ln_q.weight"),
    ("self_qkv/norm_k/scale", "attn2.norm_k.weight", "x_block.attn2.ln_k.weight"),
)


_LAST_TEXT: Names = (("text_modulation/linear", "norm1_context.linear", "context_block.adaLN_modulation.1"),)
_POSITIONS: Names = (("positions", "pos_embed.pos_embed", "pos_embed"),)
_PATCHES: Names = (("image_in", "pos_embed.proj", "x_embedder.proj"),)
_FINAL_MODULATION: Names = (("final_modulation/linear", "norm_out.linear", "final_layer.adaLN_modulation.1"),)
_FINAL: Names = (("final", "proj_out", "final_layer.linear"),)


def sd3_layout(config: Sd3Config, fmt: Format = "diffusers") -> Layout:
    """All tensors of an SD3.5 checkpoint of this size: 909 for Medium and 1227 for Large, 665 and 923 in the original
    format."""
    dual, inside = config.num_dual_blocks, "transformer_blocks.{}." if fmt == "diffusers" else "joint_blocks.{}."
    two_halves = _swapped if fmt == "diffusers" else linear
    block = lambda folder, layers, scales: (
        *tensors(layers, fmt, linear, folder, inside),
        *tensors(scales, fmt, scale, folder, inside),
    )
    last = (*block("last_blocks/", _BLOCK, _SCALES), *tensors(_LAST_TEXT, fmt, two_halves, "last_blocks/", inside))
    return (
        *tensors(_POSITIONS, fmt, lambda name, path: (entry(name, path, form=SQUEEZED),)),
        *tensors(_PATCHES, fmt, lambda name, path: _formed(name, path, PATCH_CONV, AS_IS)),
        *tensors(_TOP, fmt, linear),
        *for_layers(dual, block("dual_blocks/", _BLOCK + _TEXT + _DUAL, _SCALES + _DUAL_SCALES)),
        *for_layers(config.num_plain_blocks, block("plain_blocks/", _BLOCK + _TEXT, _SCALES), first=dual),
        *for_layers(1, last, config.num_blocks - 1),
        *tensors(_FINAL_MODULATION, fmt, two_halves),
        *tensors(_FINAL, fmt, lambda name, path: _formed(name, path, LINEAR_PATCH_ROWS, PATCH_ROWS)),
    )


def _swapped(name: str, path: str) -> Layout:
    return _formed(name, path, LINEAR_SWAPPED, SWAPPED)


def _formed(name: str, path: str, kernel: Form, bias: Form) -> Layout:
    return entry(f"{name}.weight", f"{path}/kernel", form=kernel), entry(f"{name}.bias", f"{path}/bias", form=bias)


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
