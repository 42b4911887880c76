"""The small files of a FLUX.1 folder, sizes, schedule and tokenizers: whether they fit one another, before weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.clip import ClipTextConfig
from egrpo_jax.models.flux import FluxConfig
from egrpo_jax.models.t5 import T5Config
from egrpo_jax.text.tokenizers import (
    PublishedTokenizer,
    check_clip_ids,
    check_vocabulary,
    load_clip_tokenizer,
    load_t5_tokenizer,
)
from egrpo_jax.weights.configs import read_config
from egrpo_jax.weights.published import clip, t5, vae
from egrpo_jax.weights.published.scheduler import read_scheduler

_PATCH = 2  # latents along each side of an image token
_STRIDE = 8  # pixels along each side of a latent


class TextParts(NamedTuple):
    """The sizes of the text encoders, and their tokenizers."""

    t5: T5Config
    t5_tokenizer: PublishedTokenizer
    clip: ClipTextConfig
    clip_tokenizer: PublishedTokenizer


def check_parts(folder: Path, transformer: FluxConfig, text_tokens: int | None) -> None:
    """Holds the parts of a pipeline's `folder` against a transformer of these sizes, without reading weights.

    Args:
      folder: the pipeline's.
      transformer: the sizes of the transformer that is to be used.
      text_tokens: length of the T5 sequence, or None if the text encoders are not needed.

    Raises:
      UserError: a part is missing, wrong by itself, or does not fit; names file and key.
    """
    _check_vae(folder / "vae", transformer)
    read_scheduler(folder / "scheduler")
    if text_tokens is not None:
        parts = read_text_parts(folder, text_tokens)
        t5_file, clip_file = (folder / name / "config.json" for name in ("text_encoder_2", "text_encoder"))
        _check_width(t5_file, "d_model", parts.t5.width, transformer.text_dim, "joint_attention_dim")
        width = parts.clip.transformer.width
        _check_width(clip_file, "hidden_size", width, transformer.pooled_dim, "pooled_projection_dim")


def _check_width(file: Path, key: str, found: int, expected: int, theirs: str) -> None:
    if found != expected:
        raise UserError(f"{file}: {key} is {found}; must be {expected}, the {theirs} of the transformer")


def read_text_parts(folder: Path, text_tokens: int) -> TextParts:
    """The sizes and tokenizers of the text encoders of a pipeline's `folder`; T5 writes sequences of `text_tokens`.

    Raises:
      UserError: a file is missing or wrong, or an encoder does not fit the ids that its tokenizer gives.
    """
    published_t5 = read_config(folder / "text_encoder_2", "T5EncoderModel")
    published_clip = read_config(folder / "text_encoder", "CLIPTextModel")
    parts = TextParts(
        t5.config_from_transformers(published_t5),
        load_t5_tokenizer(folder / "tokenizer_2", text_tokens),
        clip.text_config_from_transformers(published_clip),
        load_clip_tokenizer(folder / "tokenizer"),
    )
    check_vocabulary(published_t5, parts.t5.vocab_size, parts.t5_tokenizer)
    check_clip_ids(published_clip, parts.clip, parts.clip_tokenizer)
    return parts


def _check_vae(folder: Path, transformer: FluxConfig) -> None:
    published = read_config(folder, vae.CLASS_NAME)
    config = vae.config_from_diffusers(published)
    channels = transformer.in_channels / _PATCH**2
    if config.latent_channels != channels:
        raise published.error(
            "latent_channels",
            f"{channels:g}: {_PATCH} x {_PATCH} latents are the in_channels {transformer.in_channels} of a token",
        )
    if config.stride != _STRIDE:
        raise published.error("block_out_channels", f"4 levels: a latent of FLUX.1 is {_STRIDE} x {_STRIDE} pixels")
