"""The tokenizers of FLUX.1's text encoders, from the folders that they are published in.

Both turn prompts into token ids of a fixed length, because both encoders are meant to see padding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from egrpo_jax.errors import UserError

T = TypeVar("T")
Tokenize = Callable[[Sequence[str]], np.ndarray]
"""Prompts to token ids, int32 `[B, L]`."""

CLIP_LENGTH = 77
CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
T5_PAD, T5_EOS = "<pad>", "</s>"

# Words as CLIP was trained on: special tokens, English endings, letters together, digits one by one, the rest together.
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def load_clip_tokenizer(folder: str | os.PathLike[str]) -> Tokenize:
    """CLIP's byte-pair encoding, from `vocab.json` and `merges.txt`, or, without these, from `tokenizer.json`.

    Ids are int32 `[B, 77]`: a start token, at most 75 of the prompt, an end token, and more end tokens as padding.

    Raises:
      UserError: a file is missing, damaged, or not of a CLIP tokenizer.
    """
    vocab, merges, whole = (Path(folder, name) for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    if whole.is_file() and not (vocab.is_file() or merges.is_file()):
        tokenizer = _read(lambda: Tokenizer.from_file(str(whole)), whole)
        _token_ids(tokenizer, whole, CLIP_BOS, CLIP_EOS)
    else:
        tokenizer = _clip_from_merges(vocab, merges)
    return _of_fixed_length(tokenizer, CLIP_LENGTH, CLIP_EOS)


def _clip_from_merges(vocab: Path, merges: Path) -> Tokenizer:
    model = _read(
        lambda: models.BPE.from_file(
            str(vocab), str(merges), unk_token=CLIP_EOS, continuing_subword_prefix="", end_of_word_suffix="</w>"
        ),
        vocab,
        merges,
    )
    tokenizer = Tokenizer(model)
    bos, eos = _token_ids(tokenizer, vocab, CLIP_BOS, CLIP_EOS)
    tokenizer.add_special_tokens([CLIP_BOS, CLIP_EOS])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_EOS, eos), (CLIP_BOS, bos), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def load_t5_tokenizer(folder: str | os.PathLike[str], length: int) -> Tokenize:
    """T5's unigram model, from `tokenizer.json`.

    Ids are int32 `[B, length]`: at most `length - 1` of the prompt, the end token 1, and padding with 0. FLUX.1-dev was
    trained with length 512, FLUX.1-schnell with 256; states of the encoder depend on it.

    Raises:
      UserError: the file is missing, damaged, or not of a T5 tokenizer.
    """
    path = Path(folder, "tokenizer.json")
    tokenizer = _read(lambda: Tokenizer.from_file(str(path)), path)
    ids = _token_ids(tokenizer, path, T5_PAD, T5_EOS)
    if ids != [0, 1] or tokenizer.encode("").ids != [1]:
        raise UserError(
            f"{path}: {T5_PAD} and {T5_EOS} are {ids}, and the empty prompt is {tokenizer.encode('').ids}; "
            "a T5 tokenizer has [0, 1] and [1]"
        )
    return _of_fixed_length(tokenizer, length, T5_PAD)


def _read(read: Callable[[], T], *paths: Path) -> T:
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing; give the tokenizer's folder, as published, with all its files")
    try:
        return read()
    except Exception as error:  # the library raises bare Exception for a damaged file
        names = " and ".join(str(path) for path in paths)
        raise UserError(f"cannot read {names} ({' '.join(str(error).split())}); download the folder again") from None


def _token_ids(tokenizer: Tokenizer, path: Path, *tokens: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise UserError(f"{path} has no token {token}; is it the folder of another model's tokenizer?")
    return [vocabulary[token] for token in tokens]


def _of_fixed_length(tokenizer: Tokenizer, length: int, pad: str) -> Tokenize:
    """Ids of `length` tokens: cut, keeping what the tokenizer adds at the ends, or padded at the end with `pad`."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad, length=length)

    def tokenize(prompts: Sequence[str]) -> np.ndarray:
        encodings = tokenizer.encode_batch(list(prompts))
        return np.array([encoding.ids for encoding in encodings], np.int32).reshape(-1, length)

    return tokenize
