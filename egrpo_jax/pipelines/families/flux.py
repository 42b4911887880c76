"""FLUX.1: T5 for the tokens of a prompt and CLIP for one vector, guidance as an input of the distilled model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax

from egrpo_jax.models.clip import ClipText, ClipTextConfig
from egrpo_jax.models.flux import Flux, FluxConfig, forward_flops
from egrpo_jax.models.t5 import T5Config, T5Encoder
from egrpo_jax.models.vae import VaeConfig
from egrpo_jax.parallel.rules import INTO_TENSOR, OUT_OF_TENSOR, Rules
from egrpo_jax.pipelines.families.base import PUBLISHED_RULES, Family, Format, Text, TextEncoder
from egrpo_jax.pipelines.families.encoders import check_width, read_clip, read_t5
from egrpo_jax.weights.published import flux

TRANSFORMER_RULES: Rules = ((r"(out|(ff|_in)/linear_2)/kernel$", OUT_OF_TENSOR), (r"(^|/)kernel$", INTO_TENSOR))
"""For a pipeline whose parameters are the transformer's alone."""

PRESETS = {
    # Flow-GRPO's 12 published names end in `attn.to_q`, ..., which are names in the single blocks too.
    "flow_grpo": (
        r"double_blocks/(image|text)_qkv/to_[qkv]$",
        r"double_blocks/(image|text)_out$",
        r"double_blocks/(image|text)_ff/linear_[12]$",
        r"single_blocks/qkv/to_[qkv]$",
    ),
    # DanceGRPO's: every layer whose published name ends in `to_q`, `to_k`, `to_v` or `to_out.0`.
    "dance_grpo": (r"double_blocks/image_qkv/to_[qkv]$", r"double_blocks/image_out$", r"single_blocks/qkv/to_[qkv]$"),
}


class FluxText(NamedTuple):
    """The conditioning of B prompts: `text [B, L, text_dim]` and `pooled [B, pooled_dim]`."""

    text: chex.Array
    pooled: chex.Array


def _conditioning(sizes: FluxConfig, text_tokens: int, dtype: Any) -> FluxText:
    struct = jax.ShapeDtypeStruct
    return FluxText(struct((text_tokens, sizes.text_dim), dtype), struct((sizes.pooled_dim,), dtype))


def _read_text(folder: Path, sizes: FluxConfig, text_tokens: int) -> Mapping[str, TextEncoder]:
    t5, t5_width = read_t5(folder / "text_encoder_2", folder / "tokenizer_2", text_tokens)
    clip, clip_width, _ = read_clip(folder / "text_encoder", folder / "tokenizer")
    check_width(folder / "text_encoder_2/config.json", "d_model", t5_width, sizes.text_dim, "joint_attention_dim")
    check_width(
        folder / "text_encoder/config.json", "hidden_size", clip_width, sizes.pooled_dim, "pooled_projection_dim"
    )
    return {"t5": t5, "clip": clip}


FLUX = Family(
    name="FLUX.1",
    class_name=flux.CLASS_NAME,
    releases={r"flux\.1-schnell": FluxConfig(guidance_embed=False), r"flux\.1": FluxConfig()},
    read_sizes=flux.config_from_diffusers,
    write_sizes=flux.config_to_diffusers,
    formats={
        "diffusers": Format(functools.partial(flux.flux_layout, fmt="diffusers")),
        "bfl": Format(functools.partial(flux.flux_layout, fmt="bfl"), marker=r"^double_blocks\."),
    },
    module=Flux,
    forward_flops=forward_flops,
    token_channels=lambda sizes: sizes.in_channels,
    text=Text(
        parts=("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        tokens=lambda sizes: 512 if sizes.guidance_embed else 256,
        conditioning=_conditioning,
        read=_read_text,
        join=lambda features, _: FluxText(features["t5"], features["clip"].pooled),
        modules=lambda _: {
            "t5": functools.partial(T5Encoder, T5Config()),
            "clip": functools.partial(ClipText, ClipTextConfig()),
        },
    ),
    vae=VaeConfig(),
    rules=PUBLISHED_RULES,
    blocks=r"^(double|single)_blocks/.*/kernel$",
    presets=PRESETS,
    embeds_guidance=lambda sizes: sizes.guidance_embed,
    guidance=lambda *_: 3.5,
)
