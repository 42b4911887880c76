"""FLUX.2: three layers of Qwen3 for the tokens of a prompt, latents scaled by channel, shifts by tokens and steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax

from egrpo_jax.common.errors import UserError
from egrpo_jax.flow.grid import Times, empirical_shift, shifted_times
from egrpo_jax.models.flux2 import Flux2, Flux2Config, forward_flops
from egrpo_jax.models.qwen3 import Qwen3, Qwen3Config
from egrpo_jax.models.vae import VaeConfig
from egrpo_jax.pipelines.families.base import PUBLISHED_RULES, Family, Format, Text, TextEncoder
from egrpo_jax.pipelines.families.encoders import check_width, read_qwen
from egrpo_jax.text.qwen import CHAT_WITHOUT_THOUGHTS
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.published import flux2, vae

KLEIN_9B = Flux2Config(num_double_blocks=8, num_single_blocks=24, num_heads=32, text_dim=12_288)
DEV = Flux2Config(num_double_blocks=8, num_single_blocks=48, num_heads=48, text_dim=15_360, guidance_embed=True)
LAYERS = (9, 18, 27)

PRESETS = {
    # Flow-Factory's for FLUX.2; the layers out of the single blocks are not among them.
    "flow_factory": (
        r"double_blocks/(image|text)_qkv/to_[qkv]$",
        r"double_blocks/(image|text)_out$",
        r"double_blocks/(image|text)_ff/linear_[12]$",
        r"single_blocks/qkv_mlp$",
    ),
    "attention": (r"double_blocks/(image|text)_qkv/to_[qkv]$", r"double_blocks/(image|text)_out$"),
}


class Flux2Text(NamedTuple):
    """The conditioning of B prompts: `text [B, L, text_dim]`."""

    text: chex.Array


def _read_text(folder: Path, sizes: Flux2Config, text_tokens: int) -> Mapping[str, TextEncoder]:
    if sizes.guidance_embed:
        raise UserError(f"{folder} is a FLUX.2-dev, whose text encoder is not here; give it stored embeddings")
    tokenizer = folder / "tokenizer"
    qwen, width = read_qwen(folder / "text_encoder", tokenizer, text_tokens, CHAT_WITHOUT_THOUGHTS, LAYERS)
    file = folder / "text_encoder" / "config.json"
    check_width(
        file, "hidden_size", width // len(LAYERS), sizes.text_dim // len(LAYERS), "third of joint_attention_dim"
    )
    return {"qwen": qwen}


def _text_modules(sizes: Flux2Config) -> Mapping[str, Callable[[Any], nn.Module]]:
    """Qwen3-4B or 8B; none for FLUX.2-dev."""
    config = Qwen3Config(width=4096, mlp_dim=12_288) if sizes == KLEIN_9B else Qwen3Config()
    return {} if sizes.guidance_embed else {"qwen": functools.partial(Qwen3, config, LAYERS)}


def _times(scheduler: Published, image_tokens: int, num_steps: int) -> Times:
    """What the scheduler says of shifts does not count: the pipeline passes it its own."""
    del scheduler
    return shifted_times(num_steps, empirical_shift(image_tokens, num_steps))


FLUX2 = Family(
    name="FLUX.2",
    class_name=flux2.CLASS_NAME,
    releases={r"flux\.2-klein.*-9b": KLEIN_9B, r"flux\.2-klein": Flux2Config(), r"flux\.2": DEV},
    read_sizes=flux2.config_from_diffusers,
    write_sizes=flux2.config_to_diffusers,
    formats={
        "diffusers": Format(functools.partial(flux2.flux2_layout, fmt="diffusers")),
        "bfl": Format(functools.partial(flux2.flux2_layout, fmt="bfl"), marker=r"^double_blocks\."),
    },
    module=Flux2,
    forward_flops=forward_flops,
    token_channels=lambda sizes: sizes.in_channels,
    text=Text(
        parts=("text_encoder", "tokenizer"),
        tokens=lambda _: 512,
        conditioning=lambda sizes, tokens, dtype: Flux2Text(jax.ShapeDtypeStruct((tokens, sizes.text_dim), dtype)),
        read=_read_text,
        join=lambda features, _: Flux2Text(features["qwen"]),
        modules=_text_modules,
    ),
    vae=VaeConfig(
        latent_channels=32, scaling_factor=1.0, shift_factor=0.0, use_post_quant_conv=True, batch_norm_eps=1e-4
    ),
    vae_class=vae.FLUX2_CLASS_NAME,
    rules=PUBLISHED_RULES,
    blocks=r"^(double|single)_blocks/.*/kernel$",
    presets=PRESETS,
    embeds_guidance=lambda sizes: sizes.guidance_embed,
    guidance=lambda _, index: 1.0 if index.get("is_distilled") else 4.0,
    unguided=1.0,
    times=_times,
)
