"""The tokenizers of CLIP and T5, from the folders that they are published in, and what others have in common with them.

All turn prompts into token ids of a fixed length, because the encoders of FLUX.1 and SD3.5 are meant to see padding.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import ftfy
import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.clip import ClipTextConfig
from egrpo_jax.text.special_tokens import CLIP_BOS, CLIP_EOS, add_special_tokens
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.published.clip import LEGACY_EOS_ID

T = TypeVar("T")
Tokenize = Callable[[Sequence[str]], np.ndarray]
"""Prompts to token ids, int32 `[B, L]`."""


class Tokens(NamedTuple):
    """Token ids, int32 `[B, L]`, and a boolean mask `[B, L]` that is False where they are padding."""

    ids: np.ndarray
    mask: np.ndarray


class PublishedTokenizer:
    """Turns prompts into token ids, int32 `[B, length]`: cut, with the tokens for the ends kept, or padded at the end.

    Attributes:
      length: of every row.
      last_id: the highest id that a prompt can be given.
      pad_id: the id of padding.
    """

    def __init__(
        self, tokenizer: Tokenizer, length: int, pad: str, prepare: Callable[[str], str] = lambda prompt: prompt
    ) -> None:
        """Sets `tokenizer` up; `pad` is a token of it, `prepare` changes prompts before it sees them."""
        self.length, self.pad_id = length, tokenizer.token_to_id(pad)
        self.last_id = max(tokenizer.get_vocab().values())
        tokenizer.enable_truncation(length)
        tokenizer.enable_padding(pad_id=self.pad_id, pad_token=pad, length=length)
        self._tokenizer, self._prepare = tokenizer, prepare

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """The ids of `prompts`."""
        return self.tokens(prompts).ids

    def tokens(self, prompts: Sequence[str]) -> Tokens:
        """The ids of `prompts`, and where they are padding; a pad token that a prompt spells is none."""
        encodings = self._tokenizer.encode_batch([self._prepare(prompt) for prompt in prompts])
        ids = np.array([encoding.ids for encoding in encodings], np.int32).reshape(-1, self.length)
        mask = np.array([encoding.attention_mask for encoding in encodings], bool).reshape(-1, self.length)
        return Tokens(ids, mask)


CLIP_LENGTH = 77
T5_PAD, T5_EOS = "<pad>", "</s>"
_BYTES_AND_ENDS = 2 * 256 + 2  # tokens of CLIP that no merge makes: bytes, within a word and at its end, start, end

# Words as CLIP was trained on: English endings, letters together, digits one by one, the rest together.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_CLIP_WORDS = rf"<\|startoftext\|>|<\|endoftext\|>|{_WORDS}"


def load_clip_tokenizer(folder: str | os.PathLike[str]) -> PublishedTokenizer:
    """CLIP's byte-pair encoding, from `vocab.json` and `merges.txt`, or, without these, from `tokenizer.json`.

    Ids are int32 `[B, 77]`: a start token, at most 75 of the prompt, an end token, and more end tokens as padding, or
    the padding that the folder names.

    Raises:
      UserError: a file is missing, damaged, or not of a CLIP tokenizer.
    """
    vocab, merges, whole = _clip_files(folder)
    if whole is not None:
        tokenizer, (bos, eos) = read_tokenizer(whole, CLIP_BOS, CLIP_EOS)
        _check_ends(tokenizer, whole, [bos], eos)
    else:
        tokenizer = _clip_from_merges(vocab, merges)
    return PublishedTokenizer(tokenizer, CLIP_LENGTH, add_special_tokens(tokenizer, folder))


def load_open_clip_tokenizer(folder: str | os.PathLike[str]) -> PublishedTokenizer:
    """The same as `load_clip_tokenizer`, but of prompts mended first, as open_clip mends them.

    Broken encodings and curly quotes are replaced and HTML's entities resolved; and what is spelled like a special
    token is text. Ids differ for such prompts alone. Padding is the end token, where open_clip has 0: no feature of a
    text depends on what follows its end.

    Raises:
      UserError: a file is missing, damaged, or not of a CLIP tokenizer.
    """
    vocab, merges, whole = _clip_files(folder)
    if whole is not None:
        tokenizer = Tokenizer(_read(lambda: Tokenizer.from_file(str(whole)), whole).model)
    else:
        tokenizer = Tokenizer(_clip_merges(vocab, merges))
    _split_words(tokenizer, _WORDS)
    _add_ends(tokenizer, *_token_ids(tokenizer, whole or vocab, CLIP_BOS, CLIP_EOS))
    return PublishedTokenizer(tokenizer, CLIP_LENGTH, CLIP_EOS, _mend)


def _mend(prompt: str) -> str:
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split()).lower()


def _clip_files(folder: str | os.PathLike[str]) -> tuple[Path, Path, Path | None]:
    """`vocab.json`, `merges.txt`, and, if it is there without these, `tokenizer.json`."""
    vocab, merges, whole = (Path(folder, name) for name in ("vocab.json", "merges.txt", "tokenizer.json"))
    return vocab, merges, whole if whole.is_file() and not (vocab.is_file() or merges.is_file()) else None


def _clip_from_merges(vocab: Path, merges: Path) -> Tokenizer:
    tokenizer = Tokenizer(_clip_merges(vocab, merges))
    ends = _token_ids(tokenizer, vocab, CLIP_BOS, CLIP_EOS)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    _split_words(tokenizer, _CLIP_WORDS)
    _add_ends(tokenizer, *ends)
    return tokenizer


def _clip_merges(vocab: Path, merges: Path) -> models.BPE:
    """CLIP's model, where each token that is no byte is made by a merge: a file cut off would give other tokens."""
    read = lambda: models.BPE.from_file(
        str(vocab), str(merges), unk_token=CLIP_EOS, continuing_subword_prefix="", end_of_word_suffix="</w>"
    )
    model = _read(read, vocab, merges)
    lines = [line for line in merges.read_text("utf-8").split("\n") if line.strip() and not line.startswith("#version")]
    expected = Tokenizer(model).get_vocab_size() - _BYTES_AND_ENDS
    if len(lines) < expected:
        raise UserError(f"{merges} has {len(lines)} merges; must have {expected} for {vocab.name}; download it again")
    return model


def _split_words(tokenizer: Tokenizer, words: str) -> None:
    """Has `tokenizer` encode what the pattern `words` finds, one by one, and leave out what is between."""
    split = pre_tokenizers.Split(Regex(words), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _add_ends(tokenizer: Tokenizer, bos: int, eos: int) -> None:
    tokenizer.post_processor = processors.RobertaProcessing(
        (CLIP_EOS, eos), (CLIP_BOS, bos), trim_offsets=False, add_prefix_space=False
    )


def load_t5_tokenizer(folder: str | os.PathLike[str], length: int) -> PublishedTokenizer:
    """T5's unigram model, from `tokenizer.json`.

    Ids are int32 `[B, length]`: at most `length - 1` of the prompt, the end token 1, and padding with 0. FLUX.1-dev was
    trained with length 512, FLUX.1-schnell with 256; states of the encoder depend on it.

    Raises:
      UserError: the file is missing, damaged, or not of a T5 tokenizer.
    """
    path = Path(folder, "tokenizer.json")
    tokenizer, ids = read_tokenizer(path, T5_PAD, T5_EOS)
    if ids != [0, 1]:
        raise UserError(f"{path}: {T5_PAD} and {T5_EOS} are {ids}; a T5 tokenizer has [0, 1]")
    _check_ends(tokenizer, path, [], 1)
    return PublishedTokenizer(tokenizer, length, T5_PAD)


def check_vocabulary(published: Published, vocab_size: int, tokenizer: PublishedTokenizer) -> None:
    """Raises UserError if `tokenizer` has ids beyond the model's: to look them up gives nan, and no error."""
    if tokenizer.last_id >= vocab_size:
        raise published.error("vocab_size", f"above {tokenizer.last_id}, the last id of its tokenizer")


def check_clip_ids(published: Published, config: ClipTextConfig, tokenizer: PublishedTokenizer) -> None:
    """Holds the text encoder that `published` describes, of sizes `config`, against its tokenizer.

    Raises:
      UserError: there are ids without an embedding, places without a position, or the pooled state would be that of
        another token than the end's, and with it the same for all prompts.
    """
    check_vocabulary(published, config.vocab_size, tokenizer)
    if config.length < tokenizer.length:
        raise published.error("max_position_embeddings", f"at least {tokenizer.length}, the length of its sequences")
    ids, mask = tokenizer.tokens([""])
    highest, end = ids.max(), ids[mask][-1]
    if (highest if config.eos_id is None else config.eos_id) != end:
        highest_id = f", or {LEGACY_EOS_ID} for the highest id" if highest == end else ""
        raise published.error("eos_token_id", f"{end}, with which its tokenizer ends prompts{highest_id}")


def read_tokenizer(path: Path, *tokens: str) -> tuple[Tokenizer, list[int]]:
    """The tokenizer in the file `path`, a `tokenizer.json`, and the ids of some of its `tokens`.

    Raises:
      UserError: the file is missing or damaged, or lacks one of `tokens`.
    """
    tokenizer = _read(lambda: Tokenizer.from_file(str(path)), path)
    return tokenizer, _token_ids(tokenizer, path, *tokens)


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
    if len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{path} has {len(vocabulary)} tokens, of which some share an id; download it again")
    return [vocabulary[token] for token in tokens]


def _check_ends(tokenizer: Tokenizer, path: Path, first: list[int], last: int) -> None:
    """Raises UserError unless prompts are between `first` and `last`: a file need not say that these are added."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for prompt in ("", "a"):
        found = tokenizer.encode(prompt).ids
        if found[: len(first)] != first or found[-1:] != [last] or (not prompt and len(found) != len(first) + 1):
            raise UserError(
                f"{path} makes {found} of the prompt {prompt!r}; must be {[*first, '...', last]}: "
                "give the model's own tokenizer"
            )
