"""FLUX.1 transformers as they are published: the tensors of both file formats, and diffusers' config.json.

BFL's files are called `flux1-dev.safetensors` and the like. The two halves of the last modulation are (shift, scale) in
them and here, (scale, shift) in diffusers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.flux import FluxConfig
from egrpo_jax.weights.configs import EVEN, FLAG, SIZE, Key, Published, list_of, nullable, one_of
from egrpo_jax.weights.layout import LINEAR_SWAPPED, SWAPPED, Layout, entry, linear
from egrpo_jax.weights.published.bfl import JOINT_ATTENTION, JOINT_ATTENTION_SCALES, Format, stack
from egrpo_jax.weights.published.names import Names, tensors

CLASS_NAME = "FluxTransformer2DModel"
KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "patch_size": Key(one_of(1), 1),  # latents are packed into patches outside
        "in_channels": Key(SIZE, 64),
        "out_channels": Key(nullable(SIZE), None),
        "num_layers": Key(SIZE, 19),
        "num_single_layers": Key(SIZE, 38),
        "attention_head_dim": Key(SIZE, 128),
        "num_attention_heads": Key(SIZE, 24),
        "joint_attention_dim": Key(SIZE, 4096),
        "pooled_projection_dim": Key(SIZE, 768),
        "guidance_embeds": Key(FLAG, False),
        "axes_dims_rope": Key(list_of(EVEN, 3), (16, 56, 56)),
    }
)
"""The keys of config.json."""

_TOP: Names = (
    ("image_in", "x_embedder", "img_in"),
    ("text_in", "context_embedder", "txt_in"),
    ("time_in/linear_1", "time_text_embed.timestep_embedder.linear_1", "time_in.in_layer"),
    ("time_in/linear_2", "time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
    ("pooled_in/linear_1", "time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
    ("pooled_in/linear_2", "time_text_embed.text_embedder.linear_2", "vector_in.out_layer"),
    ("final", "proj_out", "final_layer.linear"),
)
_GUIDANCE: Names = (
    ("guidance_in/linear_1", "time_text_embed.guidance_embedder.linear_1", "guidance_in.in_layer"),
    ("guidance_in/linear_2", "time_text_embed.guidance_embedder.linear_2", "guidance_in.out_layer"),
)
_DOUBLE: Names = (
    ("image_modulation/linear", "norm1.linear", "img_mod.lin"),
    ("text_modulation/linear", "norm1_context.linear", "txt_mod.lin"),
    *JOINT_ATTENTION,
    ("image_ff/linear_1", "ff.net.0.proj", "img_mlp.0"),
    ("image_ff/linear_2", "ff.net.2", "img_mlp.2"),
    ("text_ff/linear_1", "ff_context.net.0.proj", "txt_mlp.0"),
    ("text_ff/linear_2", "ff_context.net.2", "txt_mlp.2"),
)
_SINGLE: Names = (
    ("modulation/linear", "norm.linear", "modulation.lin"),
    ("qkv/to_q qkv/to_k qkv/to_v mlp", "attn.to_q attn.to_k attn.to_v proj_mlp", "linear1"),
    ("out", "proj_out", "linear2"),
)
_SINGLE_SCALES: Names = (
    ("qkv/norm_q/scale", "attn.norm_q.weight", "norm.query_norm.scale"),
    ("qkv/norm_k/scale", "attn.norm_k.weight", "norm.key_norm.scale"),
)


def flux_layout(config: FluxConfig, fmt: Format) -> Layout:
    """All tensors of a FLUX.1 checkpoint of this size: 1160 (diffusers) or 780 (BFL) for FLUX.1-dev."""
    return (
        *tensors(_TOP + (_GUIDANCE if config.guidance_embed else ()), fmt, linear),
        *_final_modulation(fmt),
        *stack("double_blocks", config.num_double_blocks, _DOUBLE, JOINT_ATTENTION_SCALES, fmt, linear),
        *stack("single_blocks", config.num_single_blocks, _SINGLE, _SINGLE_SCALES, fmt, linear),
    )


def _final_modulation(fmt: Format) -> Layout:
    path = "final_modulation/linear"
    if fmt == "bfl":
        return linear("final_layer.adaLN_modulation.1", path)
    return (
        entry("norm_out.linear.weight", f"{path}/kernel", form=LINEAR_SWAPPED),
        entry("norm_out.linear.bias", f"{path}/bias", form=SWAPPED),
    )


def config_from_diffusers(published: Published) -> FluxConfig:
    """The sizes that a config.json of a `FluxTransformer2DModel` names.

    Raises:
      UserError: an unknown key, or a value that no FLUX.1 transformer has.
    """
    keys = published.checked(KEYS, strict=True)
    if keys["out_channels"] not in (None, keys["in_channels"]):
        raise keys.error("out_channels", f"null, or in_channels {keys['in_channels']}: a velocity is as its latents")
    if sum(keys["axes_dims_rope"]) != keys["attention_head_dim"]:
        raise keys.error("axes_dims_rope", f"numbers that add up to attention_head_dim {keys['attention_head_dim']}")
    return FluxConfig(
        in_channels=keys["in_channels"],
        num_double_blocks=keys["num_layers"],
        num_single_blocks=keys["num_single_layers"],
        num_heads=keys["num_attention_heads"],
        head_dim=keys["attention_head_dim"],
        text_dim=keys["joint_attention_dim"],
        pooled_dim=keys["pooled_projection_dim"],
        guidance_embed=keys["guidance_embeds"],
        axes_dims=tuple(keys["axes_dims_rope"]),
    )


def config_to_diffusers(config: FluxConfig) -> dict[str, Any]:
    """The content of config.json for `config`, `_class_name` included.

    Raises:
      UserError: diffusers has no name for this `theta` or `mlp_ratio`.
    """
    if (config.theta, config.mlp_ratio) != (10_000.0, 4):
        raise UserError(
            f"theta {config.theta:g} and mlp_ratio {config.mlp_ratio} have no place in the config.json of a "
            f"{CLASS_NAME}, which means 10000 and 4"
        )
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
        "pooled_projection_dim": config.pooled_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dims),
    }
