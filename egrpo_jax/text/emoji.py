"""A wordpiece tokenizer with a fixed length, for the embedded text encoder.

The words of the emoji's names are whole pieces; any other word falls to shorter pieces, in the end to characters.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from egrpo_jax.common.errors import UserError

TOKENIZER_FILE = Path(__file__).parent.parent / "assets" / "tokenizer.json"
LENGTH = 8
_PAD, _UNKNOWN = "[PAD]", "[UNK]"


@functools.cache
def load_tokenizer(path: str | os.PathLike[str] = TOKENIZER_FILE) -> Tokenizer:
    """The tokenizer in the file `path`; by default the package's.

    Raises:
      UserError: the file is missing or damaged.
    """
    try:
        return Tokenizer.from_str(Path(path).read_text("utf-8"))
    except Exception as error:  # the library raises bare Exception for a damaged file
        raise UserError(f"cannot read the tokenizer {path} ({error}); reinstall egrpo_jax") from None


def tokenize(prompts: Sequence[str], tokenizer: Tokenizer | None = None) -> np.ndarray:
    """Token ids, int32 `[B, 8]`: lower case, without accents and punctuation, cut or padded with 0 at the end."""
    encodings = (tokenizer or load_tokenizer()).encode_batch(list(prompts))
    return np.array([encoding.ids for encoding in encodings], np.int32).reshape(-1, LENGTH)


def train_tokenizer(words: Iterable[str], num_pieces: int = 600) -> Tokenizer:
    """A tokenizer with every one of `words` as a whole piece, and about `num_pieces` parts of words for all others."""
    texts = sorted(set(words))
    learned = _assemble({_PAD: 0, _UNKNOWN: 1})
    trainer = trainers.WordPieceTrainer(
        vocab_size=num_pieces, special_tokens=[_PAD, _UNKNOWN], initial_alphabet=list(_ALPHABET), show_progress=False
    )
    learned.train_from_iterator(texts, trainer)
    whole = {word for text in texts for word, _ in _split(learned, text)}
    parts = set(learned.get_vocab()) | set(_ALPHABET) | {f"##{character}" for character in _ALPHABET}
    vocabulary = [_PAD, _UNKNOWN, *sorted((parts | whole) - {_PAD, _UNKNOWN})]
    return _assemble({piece: index for index, piece in enumerate(vocabulary)})


_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"


def _assemble(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            # '#' and '*' are all that tells two of the keycaps apart.
            normalizers.Replace(Regex(r"[^\p{L}\p{N}#*]+"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_padding(pad_id=0, pad_token=_PAD, length=LENGTH)
    tokenizer.enable_truncation(LENGTH)
    return tokenizer


def _split(tokenizer: Tokenizer, text: str) -> list[tuple[str, tuple[int, int]]]:
    return tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
