"""The text encoders that several families have: sizes and tokenizer from their folders, without weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.clip import ClipText
from egrpo_jax.models.qwen3 import Qwen3
from egrpo_jax.models.t5 import T5Encoder
from egrpo_jax.pipelines.families.base import TextEncoder
from egrpo_jax.text.qwen import load_qwen_tokenizer
from egrpo_jax.text.tokenizers import check_clip_ids, check_vocabulary, load_clip_tokenizer, load_t5_tokenizer
from egrpo_jax.weights.configs import read_config
from egrpo_jax.weights.published import clip, qwen3, t5


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


def read_qwen(
    folder: Path, tokenizer: Path, text_tokens: int, template: str, layers: Sequence[int]
) -> tuple[TextEncoder, int]:
    """The encoder of Qwen3 in `folder`, for sequences of `text_tokens`, and the width of all its `layers` together.

    Args:
      folder, tokenizer: of the pipeline's.
      text_tokens: to which prompts are padded or cut.
      template: around a prompt, one of `egrpo_jax.text.qwen`.
      layers: after which states are taken; below 0 counted from the last one.

    Raises:
      UserError: as `read_t5`, or there are not so many layers.
    """
    published = read_config(folder, qwen3.CLASS_NAME)
    config = qwen3.config_from_transformers(published)
    taken = tuple(layer % (config.num_layers + 1) if layer < 0 else layer for layer in layers)
    if max(taken) >= config.num_layers:
        raise published.error("num_hidden_layers", f"above {max(taken)}, the last of the layers that are read")
    tokenize = load_qwen_tokenizer(tokenizer, text_tokens, template)
    check_vocabulary(published, config.vocab_size, tokenize)
    encoder = TextEncoder(
        module=functools.partial(Qwen3, config, taken),
        folder=folder,
        layout=lambda names: qwen3.qwen3_layout(max(taken), qwen3.name_prefix(names)),
        tokenize=tokenize.tokens,
        ignored=qwen3.ignored(config, max(taken)),
    )
    return encoder, config.width * len(taken)


def check_width(file: Path, key: str, found: int, expected: int, theirs: str) -> None:
    """Raises UserError unless the width of a text encoder, `key` in `file`, is the transformer's, its key `theirs`."""
    if found != expected:
        raise UserError(f"{file}: {key} is {found}; must be {expected}, the {theirs} of the transformer")
