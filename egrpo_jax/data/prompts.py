"""Prompts: where they come from and in which order they are used."""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain

from egrpo_jax.common.errors import UserError
from egrpo_jax.data.emoji import heldout_names, train_names

BUILT_IN: dict[str, Callable[[], Sequence[str]]] = {"emoji_train": train_names, "emoji_heldout": heldout_names}
"""Prompt sets that come with the package."""


def read_prompts(source: str) -> list[str]:
    """The prompts of a built-in set or a UTF-8 file; blank ones do not count.

    By its ending a file is `.jsonl` or `.json` (strings, or objects with a `prompt`, one a line or in a list), `.csv`
    or `.tsv` (with a header, and a column `prompt` in any case), and otherwise text with one prompt a line.

    Raises:
      UserError: no such file, not of its kind, or no prompt in it.
    """
    if source in BUILT_IN:
        return list(BUILT_IN[source]())
    ending = Path(source).suffix.lower()
    expected, parse = _KINDS.get(ending, _TEXT)
    try:
        found = parse(_read_text(source, expected))
        prompts = [prompt.strip() for prompt in found if prompt.strip()]
    except _NoPromptsError as error:
        raise UserError(f"prompt file {source}: {error}; expected {expected}") from None
    if not prompts:
        raise UserError(f"prompt file {source}: found no prompt; expected {expected}")
    return prompts


class _NoPromptsError(ValueError):
    """Where a file is not what its ending says; the message says what was found."""


def _read_text(source: str, expected: str) -> str:
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        sets = ", ".join(BUILT_IN)
        raise UserError(f"prompt file {source}: {error.strerror}; expected a text file, or one of {sets}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {source}: byte {error.start} is not UTF-8; expected {expected}") from None
    if "\0" in text:
        raise UserError(f"prompt file {source}: found a NUL byte, so it is no text; expected {expected}")
    return text


def _json_prompt(item: Any, place: int) -> str:
    prompt = item.get("prompt") if isinstance(item, dict) else item
    if not isinstance(prompt, str):
        raise _NoPromptsError(f"entry {place} is {str(item)[:60]!r}")
    return prompt


def _parse_json(text: str, place: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _NoPromptsError(f"line {place + error.lineno - 1} is no JSON ({error.msg})") from None


def _from_jsonl(text: str) -> list[str]:
    lines = [(place, line) for place, line in enumerate(text.splitlines(), 1) if line.strip()]
    return [_json_prompt(_parse_json(line, place), place) for place, line in lines]


def _from_json(text: str) -> list[str]:
    items = _parse_json(text)
    if not isinstance(items, list):
        raise _NoPromptsError(f"found a {type(items).__name__}, no list")
    return [_json_prompt(item, place) for place, item in enumerate(items, 1)]


def _from_table(text: str, delimiter: str) -> list[str]:
    header, *rows = [*csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)] or [[]]
    columns = [place for place, name in enumerate(header) if name.strip().lower() == "prompt"]
    if not columns:
        raise _NoPromptsError(f"found the columns {header}")
    return [row[columns[0]] for row in rows if len(row) > columns[0]]


_JSON = "strings, or objects with a string 'prompt'"
_TEXT: tuple[str, Callable[[str], list[str]]] = ("one prompt a line", str.splitlines)
_KINDS: dict[str, tuple[str, Callable[[str], list[str]]]] = {
    ".jsonl": (f"one JSON value a line: {_JSON}", _from_jsonl),
    ".json": (f"a JSON list of {_JSON}", _from_json),
    ".csv": ("a table with a column 'prompt'", functools.partial(_from_table, delimiter=",")),
    ".tsv": ("a table with a column 'prompt'", functools.partial(_from_table, delimiter="\t")),
}


def prompts_at(prompts: Sequence[str], seed: int, position: int, count: int) -> list[str]:
    """`count` prompts from `position` on, in an endless order that shuffles all prompts anew in every epoch.

    The order is a function of `seed` alone, so that a position is all a checkpoint needs to keep.
    """
    order = grain.MapDataset.source(list(prompts)).shuffle(seed=seed).repeat()
    return [order[place] for place in range(position, position + count)]
