"""Stable Diffusion 3.5: two CLIPs and T5, joined along channels, then tokens; guided away from a prompt."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.clip import ClipText, ClipTextConfig, TransformerConfig
from egrpo_jax.models.sd3 import Sd3, Sd3Config, forward_flops
from egrpo_jax.models.t5 import T5Config, T5Encoder
from egrpo_jax.models.vae import VaeConfig
from egrpo_jax.pipelines.families.base import PUBLISHED_RULES, Family, Format, Text, TextEncoder
from egrpo_jax.pipelines.families.encoders import check_width, read_clip, read_t5
from egrpo_jax.pipelines.families.schedule import twice_shifted_times
from egrpo_jax.text.tokenizers import CLIP_LENGTH
from egrpo_jax.weights.published import sd3

LARGE = Sd3Config(num_blocks=38, num_dual_blocks=0, num_heads=38, max_grid=192)
CLIP_L = ClipTextConfig(projection_dim=768)
CLIP_G = ClipTextConfig(TransformerConfig(1280, 32, 20, 5120, "gelu"), projection_dim=1280)

PRESETS = {
    # Flow-GRPO's for SD3.5: all of the joint attention. The second attention of an image is not among them.
    "flow_grpo": (r"blocks/(image|text)_qkv/to_[qkv]$", r"blocks/(image|text)_out$"),
}


class Sd3Text(NamedTuple):
    """The conditioning of B prompts: `text [B, 77 + L, text_dim]` and `pooled [B, pooled_dim]`."""

    text: chex.Array
    pooled: chex.Array


def _conditioning(sizes: Sd3Config, text_tokens: int, dtype: Any) -> Sd3Text:
    struct = jax.ShapeDtypeStruct
    return Sd3Text(struct((CLIP_LENGTH + text_tokens, sizes.text_dim), dtype), struct((sizes.pooled_dim,), dtype))


def _read_text(folder: Path, sizes: Sd3Config, text_tokens: int) -> Mapping[str, TextEncoder]:
    clip_l, width_l, pooled_l = read_clip(folder / "text_encoder", folder / "tokenizer", projected=True)
    clip_g, width_g, pooled_g = read_clip(folder / "text_encoder_2", folder / "tokenizer_2", projected=True)
    t5, t5_width = read_t5(folder / "text_encoder_3", folder / "tokenizer_3", text_tokens)
    file = folder / "text_encoder_2" / "config.json"
    check_width(folder / "text_encoder_3" / "config.json", "d_model", t5_width, sizes.text_dim, "joint_attention_dim")
    check_width(file, "projection_dim", pooled_g, sizes.pooled_dim - pooled_l, "rest of the pooled_projection_dim")
    if (most := sizes.text_dim - width_l) < width_g:
        raise UserError(
            f"{file}: hidden_size is {width_g}; must be at most {most}, as both CLIPs fit beside each other"
        )
    return {"clip_l": clip_l, "clip_g": clip_g, "t5": t5}


def _join(features: Mapping[str, Any], _: Any) -> Sd3Text:
    """CLIP's penultimate states side by side, filled up with zeros to T5's width, then T5's."""
    clips, t5 = [features[name] for name in ("clip_l", "clip_g")], features["t5"]
    states = jnp.concatenate([clip.penultimate for clip in clips], axis=-1)
    states = jnp.pad(states, ((0, 0), (0, 0), (0, t5.shape[-1] - states.shape[-1])))
    return Sd3Text(jnp.concatenate([states, t5], axis=1), jnp.concatenate([clip.pooled for clip in clips], axis=-1))


SD3 = Family(
    name="SD3.5",
    class_name=sd3.CLASS_NAME,
    releases={r"stable-diffusion-3\.5-large": LARGE, r"stable-diffusion-3\.5-medium": Sd3Config()},
    read_sizes=sd3.config_from_diffusers,
    write_sizes=sd3.config_to_diffusers,
    formats={
        "diffusers": Format(sd3.sd3_layout),
        "original": Format(functools.partial(sd3.sd3_layout, fmt="original"), marker=r"^joint_blocks\."),
    },
    module=Sd3,
    forward_flops=forward_flops,
    token_channels=lambda sizes: sizes.in_channels,
    text=Text(
        parts=("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
        tokens=lambda _: 256,
        conditioning=_conditioning,
        read=_read_text,
        join=_join,
        modules=lambda _: {
            "clip_l": functools.partial(ClipText, CLIP_L),
            "clip_g": functools.partial(ClipText, CLIP_G),
            "t5": functools.partial(T5Encoder, T5Config()),
        },
    ),
    vae=VaeConfig(scaling_factor=1.5305, shift_factor=0.0609),
    rules=PUBLISHED_RULES,
    blocks=r"^(dual|plain|last)_blocks/.*/kernel$",
    presets=PRESETS,
    guidance=lambda sizes, _: 3.5 if sizes.num_dual_blocks == 0 else 4.5,  # as the cards of Large and Medium say
    unguided=1.0,
    times=twice_shifted_times,
    max_side=lambda sizes: sizes.max_grid,
    constants=r"positions$",
)
