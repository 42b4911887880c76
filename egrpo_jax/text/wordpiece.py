"""BERT's tokenizer as ImageReward uses it, from the `vocab.txt` that it is published in."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from egrpo_jax.common.errors import UserError
from egrpo_jax.text.tokenizers import PublishedTokenizer, Tokens

PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
ADDED = ("[DEC]", "[ENC]")
"""Tokens that BLIP adds to the vocabulary; no text begins with them here, but one that names them gets their ids."""


def load_wordpiece(path: str | os.PathLike[str], length: int, vocab_size: int) -> Callable[[Sequence[str]], Tokens]:
    """The uncased WordPiece of BERT, from its `vocab.txt`, or the folder that holds it.

    Each text is a start token, at most `length - 2` of the text, an end token, and padding up to `length`.

    Args:
      vocab_size: how many tokens the model knows, with those of `ADDED`.

    Raises:
      UserError: the file is missing, or not of this model.
    """
    path = Path(path) / "vocab.txt" if Path(path).is_dir() else Path(path)
    vocabulary = _read(path, vocab_size - len(ADDED))
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.add_special_tokens([PAD, UNKNOWN, START, END, MASK, *ADDED])
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing((END, vocabulary[END]), (START, vocabulary[START]))
    return PublishedTokenizer(tokenizer, length, PAD).tokens


def _read(path: Path, size: int) -> dict[str, int]:
    try:
        lines = path.read_text("utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give the folder of BERT's tokenizer, or its vocab.txt") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); download it again") from None
    vocabulary = {line: number for number, line in enumerate(lines)}
    absent = [token for token in (PAD, UNKNOWN, START, END, MASK) if token not in vocabulary]
    if len(vocabulary) != size or absent:
        lacks = f" and lacks {', '.join(absent)}" if absent else ""
        raise UserError(
            f"{path} has {len(vocabulary)} tokens{lacks}; give the vocab.txt of bert-base-uncased, with {size}"
        )
    return vocabulary
