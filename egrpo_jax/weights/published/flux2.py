"""FLUX.2 transformers as they are published: the tensors of both file formats, and diffusers' config.json.

BFL's files are called `flux-2-klein-4b.safetensors` and the like. No layer has a bias. The layers of single blocks and
of feed-forward parts are joined in both formats, and here. The two halves of the last modulation are (shift, scale) in
BFL's files and here, (scale, shift) in diffusers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from egrpo_jax.models.flux2 import Flux2Config
from egrpo_jax.models.layers import TIME_FEATURES
from egrpo_jax.weights.configs import EVEN, FLAG, POSITIVE, SIZE, Key, Kind, Published, list_of, nullable, one_of
from egrpo_jax.weights.layout import LINEAR_SWAPPED, Layout, entry, kernel
from egrpo_jax.weights.published.bfl import JOINT_ATTENTION, JOINT_ATTENTION_SCALES, Format, stack
from egrpo_jax.weights.published.names import Names, tensors

CLASS_NAME = "Flux2Transformer2DModel"
_WHOLE = Kind("a positive, whole number", lambda x: POSITIVE.fits(x) and x % 1 == 0 and SIZE.fits(int(x)))
KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "patch_size": Key(one_of(1), 1),  # latents are packed into patches outside
        "in_channels": Key(SIZE, 128),
        "out_channels": Key(nullable(SIZE), None),
        "num_layers": Key(SIZE, 8),
        "num_single_layers": Key(SIZE, 48),
        "attention_head_dim": Key(SIZE, 128),
        "num_attention_heads": Key(SIZE, 48),
        "joint_attention_dim": Key(SIZE, 15360),
        "timestep_guidance_channels": Key(one_of(TIME_FEATURES), TIME_FEATURES),
        "mlp_ratio": Key(_WHOLE, 3.0),
        "axes_dims_rope": Key(list_of(EVEN, 4), (32, 32, 32, 32)),
        "rope_theta": Key(POSITIVE, 2000),
        "eps": Key(one_of(1e-6), 1e-6),
        "guidance_embeds": Key(FLAG, True),
    }
)
"""The keys of config.json."""

_TOP: Names = (
    ("image_in", "x_embedder", "img_in"),
    ("text_in", "context_embedder", "txt_in"),
    ("time_in/linear_1", "time_guidance_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    ("time_in/linear_2", "time_guidance_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    ("image_modulation/linear", "double_stream_modulation_img.linear", "double_stream_modulation_img.lin"),
    ("text_modulation/linear", "double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin"),
    ("single_modulation/linear", "single_stream_modulation.linear", "single_stream_modulation.lin"),
    ("final", "proj_out", "final_layer.linear"),
)
_GUIDANCE: Names = (
    ("guidance_in/linear_1", "time_guidance_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    ("guidance_in/linear_2", "time_guidance_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
)
_DOUBLE: Names = (
    *JOINT_ATTENTION,
    ("image_ff/linear_1", "ff.linear_in", "img_mlp.0"),
    ("image_ff/linear_2", "ff.linear_out", "img_mlp.2"),
    ("text_ff/linear_1", "ff_context.linear_in", "txt_mlp.0"),
    ("text_ff/linear_2", "ff_context.linear_out", "txt_mlp.2"),
)
_SINGLE: Names = (
    ("qkv_mlp", "attn.to_qkv_mlp_proj", "linear1"),
    ("out", "attn.to_out", "linear2"),
)
_SINGLE_SCALES: Names = (
    ("norm_q/scale", "attn.norm_q.weight", "norm.query_norm.scale"),
    ("norm_k/scale", "attn.norm_k.weight", "norm.key_norm.scale"),
)


def flux2_layout(config: Flux2Config, fmt: Format) -> Layout:
    """All tensors of a FLUX.2 checkpoint of this size: 169 (diffusers) or 149 (BFL) for FLUX.2-klein-4B."""
    return (
        *tensors(_TOP + (_GUIDANCE if config.guidance_embed else ()), fmt, kernel),
        *_final_modulation(fmt),
        *stack("double_blocks", config.num_double_blocks, _DOUBLE, JOINT_ATTENTION_SCALES, fmt, kernel),
        *stack("single_blocks", config.num_single_blocks, _SINGLE, _SINGLE_SCALES, fmt, kernel),
    )


def _final_modulation(fmt: Format) -> Layout:
    path = "final_modulation/linear"
    if fmt == "bfl":
        return kernel("final_layer.adaLN_modulation.1", path)
    return (entry("norm_out.linear.weight", f"{path}/kernel", form=LINEAR_SWAPPED),)


def config_from_diffusers(published: Published) -> Flux2Config:
    """The sizes that a config.json of a `Flux2Transformer2DModel` names.

    Raises:
      UserError: an unknown key, or a value that no FLUX.2 transformer has.
    """
    keys = published.checked(KEYS, strict=True)
    if keys["out_channels"] not in (None, keys["in_channels"]):
        raise keys.error("out_channels", f"null, or in_channels {keys['in_channels']}: a velocity is as its latents")
    if sum(keys["axes_dims_rope"]) != keys["attention_head_dim"]:
        raise keys.error("axes_dims_rope", f"numbers that add up to attention_head_dim {keys['attention_head_dim']}")
    return Flux2Config(
        in_channels=keys["in_channels"],
        num_double_blocks=keys["num_layers"],
        num_single_blocks=keys["num_single_layers"],
        num_heads=keys["num_attention_heads"],
        head_dim=keys["attention_head_dim"],
        text_dim=keys["joint_attention_dim"],
        guidance_embed=keys["guidance_embeds"],
        axes_dims=tuple(keys["axes_dims_rope"]),
        theta=keys["rope_theta"],
        mlp_ratio=int(keys["mlp_ratio"]),
    )


def config_to_diffusers(config: Flux2Config) -> dict[str, Any]:
    """The content of config.json for `config`, `_class_name` included."""
    return {
        "_class_name": CLASS_NAME,
        "patch_size": 1,
        "in_channels": config.in_channels,
        "out_channels": None,
        "num_layers": config.num_double_blocks,
        "num_single_layers": config.num_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.text_dim,
        "timestep_guidance_channels": TIME_FEATURES,
        "mlp_ratio": float(config.mlp_ratio),
        "axes_dims_rope": list(config.axes_dims),
        "rope_theta": config.theta,
        "eps": 1e-6,
        "guidance_embeds": config.guidance_embed,
    }
