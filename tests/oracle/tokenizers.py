"""The tokenizers of transformers over small vocabularies: what ours are held against.

`python -m tests.oracle.tokenizers` writes tests/golden/tokenizers.npz. The vocabularies are built by rule, so that
golden ids do not depend on a trainer.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

GOLDEN = Path(__file__).parent.parent / "golden" / "tokenizers.npz"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
T5_LENGTHS = (16, 5)
PROMPTS = (
    "a photo of a cat",
    "A Photo,  of\tTWO cats\n",
    "it's the dog's 3rd photo... isn't it?!",
    "Café naïve Ünïcode e\u0301clair",
    "一只猫的照片, 猫",
    "写真 カメラ ｶﾒﾗ ①②",
    "🐱🚀 a cat 👩‍🚀 flag 🇫🇷",
    "",
    "   ",
    " ".join(["photo of the cat and 12 dogs,"] * 30),
    "猫" * 200,
    "the end <|endoftext|> of the text",
    "fish & chips &amp; “quotes” — dash <tag> under_score",
)
# Padding that is a word: of these, ids depend on the folder's own special tokens.
MARKED = (
    *PROMPTS, "!", "wow!", "!!!", "a cat ! and a dog!?", "the photo !, of !!the cat", "写真! 猫\uff01", "Café! 🐱!",
    "<|STARTOFTEXT|> of the <|EndOfText|> cat", " ".join(["wow! the cat,"] * 700), "!" * 200,
)  # fmt: skip
KINDS = (
    "first", "second", "older first", "older second", "map alone", "config alone", "list is right", "stripping list",
    "another word",
)  # fmt: skip
"""The names of `settings`."""
WORDS = ("photo", "of", "cat", "cats", "the", "dog", "and", "text", "it", "猫", "é")


def byte_letters():
    """The letter that byte-level encodings write for each of the 256 bytes, in their order in CLIP's vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def write_clip(folder):
    """A vocabulary in CLIP's two files: bytes, bytes at a word's end, `WORDS` joined from the left, special tokens."""
    letters = byte_letters()
    merges = []
    for word in WORDS:
        *inner, last = (letters[byte] for byte in word.encode())
        parts = [*inner, f"{last}</w>"]
        for place in range(1, len(parts)):
            merges.append(("".join(parts[:place]), parts[place]))
    merges = list(dict.fromkeys(merges))
    alphabet = list(letters.values())
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges), BOS, EOS]
    write_clip_files(folder, {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, merges)


def write_clip_files(folder, vocabulary, merges):
    Path(folder, "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    Path(folder, "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")


def token(content, **flags):
    """A special token as published files write it."""
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **flags}


def settings(vocabulary):
    """By name, what folders say of their special tokens: tokenizer_config.json, then special_tokens_map.json."""
    listed = lambda *tokens: {
        "added_tokens_decoder": {str(vocabulary[one["content"]]): {**one, "special": True} for one in tokens}
    }
    ends, bang = (token(BOS, normalized=True), token(EOS)), token("!")
    names = lambda pad: {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad}
    objects = lambda pad: dict(zip(names(pad), (*ends, ends[1], pad), strict=True))
    return {
        "first": (names(EOS) | listed(*ends), objects(EOS)),
        "second": (names("!") | listed(bang, *ends), objects("!")),
        "older first": ({"pad_token": "!", "unk_token": {"__type": "AddedToken", **token(EOS)}}, objects(EOS)),
        "older second": (names(EOS), objects("!")),
        "map alone": (None, {"pad_token": token("!", lstrip=True)}),
        "config alone": ({"pad_token": "!"}, None),
        "list is right": (names("!") | listed(*ends), objects(EOS)),
        "stripping list": (listed(token("!", rstrip=True), token("7", single_word=True)), None),
        "another word": (names("cat</w>"), None),
    }


def write_marked_clip(folder, kind):
    """The vocabulary of `write_clip` with the files of `settings` beside it."""
    write_clip(folder)
    vocabulary = json.loads(Path(folder, "vocab.json").read_text("utf-8"))
    write_settings(folder, *settings(vocabulary)[kind])


def write_settings(folder, config, older):
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", older)):
        if content is not None:
            Path(folder, name).write_text(json.dumps(content), "utf-8")


def t5_pieces():
    """Pieces with log-probabilities: special tokens, single characters, words at a word's start and inside."""
    characters = sorted({c for prompt in PROMPTS[:4] for c in prompt if not c.isspace()} | set("猫写真,"))
    words = [("▁" + word, -4.0 - 0.1 * place) for place, word in enumerate(WORDS)]
    inside = [(word, -6.0 - 0.1 * place) for place, word in enumerate(WORDS) if len(word) > 1]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return special + words + inside + [(c, -9.0) for c in characters if c not in dict(words + inside)]


def write_t5(folder, pieces=None):
    """A `tokenizer.json` as T5's: compatibility normalisation, words marked at their start, the end token added."""
    tokenizer = Tokenizer(models.Unigram(pieces or t5_pieces(), unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(Path(folder, "tokenizer.json")))


def published_clip_ids(folder, prompts=PROMPTS):
    """What transformers makes of the two files, int32 `[B, 77]`."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    encoded = tokenizer(list(prompts), padding="max_length", max_length=77, truncation=True)
    return np.array(encoded.input_ids, np.int32)


def marked_clip_ids(kind):
    """The ids of `MARKED` with these settings."""
    with tempfile.TemporaryDirectory() as folder:
        write_marked_clip(folder, kind)
        return published_clip_ids(folder, MARKED)


def published_t5_ids(folder, length, prompts=PROMPTS):
    """What transformers makes of `tokenizer.json`, int32 `[B, length]`."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(Path(folder, "tokenizer.json")), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    encoded = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True)
    return np.array(encoded.input_ids, np.int32)


def cases():
    """The ids of `PROMPTS` by name."""
    with tempfile.TemporaryDirectory() as clip, tempfile.TemporaryDirectory() as t5:
        write_clip(clip)
        write_t5(t5)
        return (
            {"clip": published_clip_ids(clip)}
            | {f"clip {kind}": marked_clip_ids(kind) for kind in KINDS}
            | {f"t5_{length}": published_t5_ids(t5, length) for length in T5_LENGTHS}
        )


def main():
    np.savez_compressed(GOLDEN, **{f"{name}/ids": ids for name, ids in cases().items()})


if __name__ == "__main__":
    main()
