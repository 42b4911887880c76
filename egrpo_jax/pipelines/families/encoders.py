"""The text encoders that several families have: sizes and tokenizer from their folders, without weights."""

from __future__ import annotations

import functools
from pathlib import Path

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.clip import ClipText
from egrpo_jax.models.t5 import T5Encoder
from egrpo_jax.pipelines.families.base import TextEncoder
from egrpo_jax.text.tokenizers import check_clip_ids, check_vocabulary, load_clip_tokenizer, load_t5_tokenizer
from egrpo_jax.weights.configs import read_config
from egrpo_jax.weights.published import clip, t5


def read_t5(folder: Path, tokenizer: Path, text_tokens: int) -> tuple[TextEncoder, int]:
    """The encoder of T5 in `folder`, for sequences of `text_tokens`, and its width.

    Raises:
      UserError: a file is missing or wrong, or the encoder does not fit the ids that its tokenizer gives.
    """
    published = read_config(folder, "T5EncoderModel")
    config = t5.config_from_transformers(published)
    tokenize = load_t5_tokenizer(tokenizer, text_tokens)
    check_vocabulary(published, config.vocab_size, tokenize)
    encoder = TextEncoder(
        module=functools.partial(T5Encoder, config),
        folder=folder,
        layout=lambda _: t5.t5_layout(config),
        tokenize=lambda prompts: (tokenize(prompts),),
        ignored=t5.IGNORED,
    )
    return encoder, config.width


def read_clip(folder: Path, tokenizer: Path, projected: bool = False) -> tuple[TextEncoder, int, int]:
    """The text encoder of CLIP in `folder`, one whose pooled state is `projected` or not, its width and the pooled one.

    Raises:
      UserError: as `read_t5`.
    """
    if projected:
        published = read_config(folder, "CLIPTextModelWithProjection")
        config = clip.projected_text_config_from_transformers(published)
    else:
        published = read_config(folder, "CLIPTextModel")
        config = clip.text_config_from_transformers(published)
    tokenize = load_clip_tokenizer(tokenizer)
    check_clip_ids(published, config, tokenize)
    encoder = TextEncoder(
        module=functools.partial(ClipText, config),
        folder=folder,
        layout=lambda names: clip.clip_text_layout(config, clip.text_prefix(names)),
        tokenize=lambda prompts: (tokenize(prompts),),
        ignored=clip.IGNORED,
    )
    width = config.transformer.width
    return encoder, width, config.projection_dim or width


def check_width(file: Path, key: str, found: int, expected: int, theirs: str) -> None:
    """Raises UserError unless the width of a text encoder, `key` in `file`, is the transformer's, its key `theirs`."""
    if found != expected:
        raise UserError(f"{file}: {key} is {found}; must be {expected}, the {theirs} of the transformer")
