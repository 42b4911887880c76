"""Z-Image: one layer of Qwen3 for the tokens of a prompt, padding left out of attention; FLUX.1's autoencoder."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.models.qwen3 import Qwen3, Qwen3Config
from egrpo_jax.models.vae import VaeConfig
from egrpo_jax.models.z_image import MULTIPLE, ZImage, ZImageConfig, forward_flops
from egrpo_jax.pipelines.families.base import PUBLISHED_RULES, Family, Format, Text, TextEncoder
from egrpo_jax.pipelines.families.encoders import check_width, read_qwen
from egrpo_jax.text.qwen import CHAT
from egrpo_jax.weights.published import z_image

LAST_BUT_ONE = -2

PRESETS = {
    # Flow-Factory's for Z-Image: all of the attention and of the feed-forward parts.
    "flow_factory": (r"/qkv/to_[qkv]$", r"/out$", r"/ff/linear_[123]$"),
    "attention": (r"/qkv/to_[qkv]$", r"/out$"),
}


class ZImageText(NamedTuple):
    """The conditioning of B prompts: `text [B, L, text_dim]`, and `lengths [B]`, how many of the tokens are theirs."""

    text: chex.Array
    lengths: chex.Array


def _conditioning(sizes: ZImageConfig, text_tokens: int, dtype: Any) -> ZImageText:
    struct = jax.ShapeDtypeStruct
    return ZImageText(struct((text_tokens, sizes.text_dim), dtype), struct((), jnp.int32))


def _read_text(folder: Path, sizes: ZImageConfig, text_tokens: int) -> Mapping[str, TextEncoder]:
    qwen, width = read_qwen(folder / "text_encoder", folder / "tokenizer", text_tokens, CHAT, [LAST_BUT_ONE])
    check_width(folder / "text_encoder" / "config.json", "hidden_size", width, sizes.text_dim, "cap_feat_dim")
    return {"qwen": qwen}


def _join(features: Mapping[str, Any], tokens: Mapping[str, Any]) -> ZImageText:
    return ZImageText(features["qwen"], jnp.asarray(tokens["qwen"].mask.sum(-1), jnp.int32))


def _format(fmt: z_image.Format, prefix: str = "", marker: str = "") -> Format:
    layout = functools.partial(z_image.z_image_layout, fmt=fmt, prefix=prefix)
    return Format(layout, marker, z_image.IGNORED)


Z_IMAGE = Family(
    name="Z-Image",
    class_name=z_image.CLASS_NAME,
    releases={r"z-image": ZImageConfig()},
    read_sizes=z_image.config_from_diffusers,
    write_sizes=z_image.config_to_diffusers,
    formats={
        "diffusers": _format("diffusers"),
        "original": _format("original", marker=r"^layers\.0\.attention\.qkv\."),
        "prefixed": _format("original", z_image.PREFIX, rf"^{z_image.PREFIX}"),
    },
    module=ZImage,
    forward_flops=forward_flops,
    token_channels=lambda sizes: sizes.in_channels,
    text=Text(
        parts=("text_encoder", "tokenizer"),
        tokens=lambda _: 512,
        conditioning=_conditioning,
        read=_read_text,
        join=_join,
        modules=lambda _: {"qwen": functools.partial(Qwen3, Qwen3Config(), (Qwen3Config().num_layers - 1,))},
    ),
    vae=VaeConfig(),
    rules=PUBLISHED_RULES,
    blocks=r"^(noise_refiner|context_refiner|layers)/.*/kernel$",
    presets=PRESETS,
    guidance=lambda *_: None,  # Z-Image-Turbo has the same sizes, and none
    unguided=0.0,
    max_side=lambda sizes: min(sizes.axes_lens[1:]),
    max_text=lambda sizes: (sizes.axes_lens[0] - 2) // MULTIPLE * MULTIPLE,  # two positions after the text's padding
)
