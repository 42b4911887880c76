"""The special tokens of a published CLIP tokenizer, as the JSON files beside its vocabulary name them.

They are looked for in a prompt before it is cut into words: a token that pads and is also a word, as "!" is in the
second tokenizer of SD3.5, is then found within other words, and "wow!" has other ids.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from egrpo_jax.weights.configs import Key, Kind, Published, nullable, read_object

CLIP_BOS, CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
SPECIAL_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
"""Where they are named; a folder need not have these files."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_ROLES = {"bos_token": CLIP_BOS, "eos_token": CLIP_EOS, "unk_token": CLIP_EOS, "pad_token": CLIP_EOS}


def _is_object(value: Any) -> bool:
    named = isinstance(value, dict) and isinstance(value.get("content"), str) and bool(value["content"])
    return named and all(isinstance(value.get(flag, False), bool) for flag in _FLAGS)


_TOKEN = Kind(
    "a token, or an object with its content and flags",
    lambda value: (isinstance(value, str) and bool(value)) or _is_object(value),
)
_LISTED = Kind(
    "an object of ids, each with a token's content and flags",
    lambda value: isinstance(value, dict) and all(key.isdecimal() and _is_object(value[key]) for key in value),
)
_KEYS = {**{role: Key(nullable(_TOKEN), None) for role in _ROLES}, "added_tokens_decoder": Key(nullable(_LISTED), None)}


def add_special_tokens(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> str:
    """Has `tokenizer` look for the special tokens that `folder` names, as transformers 5 does.

    The list by ids of tokenizer_config.json goes first. In a folder without it, special_tokens_map.json is right where
    the two differ. All that no file names is CLIP's own: the end token pads.

    Raises:
      UserError: a file is damaged, or names something that is no token.
    """
    config, older = (_read(Path(folder, name)) for name in SPECIAL_TOKEN_FILES)
    listed = config["added_tokens_decoder"]
    files = (older, config) if listed is None else (config,)
    roles = [
        next((file[role] for file in files if file[role] is not None), default) for role, default in _ROLES.items()
    ]
    tokenizer.add_tokens([_added(listed[number]) for number in sorted(listed or {}, key=int)])
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for token in map(_added, roles) if token.content not in known])
    return _added(roles[-1]).content


def _read(path: Path) -> Published:
    return (read_object(path) if path.is_file() else Published({}, str(path))).checked(_KEYS)


def _added(token: str | dict[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    return AddedToken(token["content"], **{"special": True} | {flag: token[flag] for flag in _FLAGS if flag in token})
