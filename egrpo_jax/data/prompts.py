"""Prompts: where they come from, in which order they are used, and how they are told apart."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
import reprlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain

from egrpo_jax.common.errors import UserError
from egrpo_jax.data.emoji import heldout_names, train_names

BUILT_IN: dict[str, Callable[[], Sequence[str]]] = {"emoji_train": train_names, "emoji_heldout": heldout_names}
"""Prompt sets that come with the package."""

Placed = Iterator[tuple[str, str]]
"""Prompts of a file, each after its location there: "line 3"."""


def read_prompts(source: str) -> list[str]:
    """The prompts of a built-in set or a UTF-8 file, without space at their ends.

    By its ending a file is `.jsonl` or `.json` (strings, or objects with a `prompt`, one a line or in a list), `.csv`
    or `.tsv` (a header with `prompt`; in a TSV a quote is text), and otherwise text with one prompt a line. `prompt`
    may be `prompts` too, in any case. A line ends at a line feed and nowhere else. Prompts that are blank, or made of
    invisible characters, do not count; repeated ones do, but for the further samples of a prompt in the `scores.jsonl`
    of `evaluate`.

    Raises:
      UserError: no such file, not of its kind, a prompt that is no text, or none at all.
    """
    if source in BUILT_IN:
        return list(BUILT_IN[source]())
    expected, parse = _KINDS.get(Path(source).suffix.lower(), _TEXT)
    try:
        prompts = [_checked(prompt, location) for location, prompt in parse(_read_text(source)) if _is_visible(prompt)]
    except _Fault as fault:
        raise UserError(f"prompt file {source}: {fault}; expected {expected}") from None
    if not prompts:
        raise UserError(f"prompt file {source}: found no prompt; expected {expected}")
    return prompts


class _Fault(ValueError):
    """Raised where a file is not what its ending says; the message says what was found."""


def _read_text(source: str) -> str:
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        sets = ", ".join(BUILT_IN)
        raise UserError(f"prompt file {source}: {error.strerror}; expected a text file, or one of {sets}") from None
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        hint = ", but looks like UTF-16" if utf16 else ""
        raise _Fault(f"line {line}: byte {error.start} is not UTF-8{hint}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise _Fault(f"line {line}: found a NUL byte, so it is no UTF-8 text")
    return re.sub("^\ufeff+", "", text, flags=re.MULTILINE)  # byte-order marks: also where files were joined


def _is_visible(prompt: str) -> bool:
    """Tells if there is more than space, control and format characters, and marks on other characters."""
    return any(
        unicodedata.category(letter) not in {"Cc", "Cf", "Mn", "Zl", "Zp", "Zs"} and letter not in _FILLERS
        for letter in prompt
    )


_FILLERS = "\u115f\u1160\u2800\u3164\uffa0"
"""Letters and symbols that are drawn as nothing: Hangul fillers and the empty Braille pattern."""


def _checked(prompt: str, location: str) -> str:
    """The prompt without space at its ends. JSON can escape what is no text in UTF-8."""
    if wrong := re.search("[\0\ud800-\udfff]", prompt):
        what = "NUL" if wrong[0] == "\0" else f"half a character, \\u{ord(wrong[0]):04x},"
        raise _Fault(f"{location} has {what} in its prompt")
    return prompt.strip()


def _lines(text: str) -> Iterator[tuple[int, str]]:
    return enumerate(text.split("\n"), 1)


def _from_text(text: str) -> Placed:
    return ((f"line {number}", line) for number, line in _lines(text))


def _from_jsonl(text: str) -> Placed:
    lines = ((number, line) for number, line in _lines(text) if _is_visible(line))
    return _json_prompts((f"line {number}", _parse_json(line, f"line {number}", number)) for number, line in lines)


def _from_json(text: str) -> Placed:
    items = _parse_json(text, "the file", 1)
    if not isinstance(items, list):
        raise _Fault(f"found a {type(items).__name__}, no list")
    return _json_prompts((f"entry {number}", item) for number, item in enumerate(items, 1))


def _parse_json(text: str, location: str, first_line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_json_object, parse_int=_json_number)
    except json.JSONDecodeError as error:
        raise _Fault(f"line {first_line + error.lineno - 1} is no JSON ({error.msg})") from None
    except _Fault as fault:
        raise _Fault(f"{location} {fault}") from None
    except RecursionError:
        raise _Fault(f"{location} is nested too deeply") from None


def _json_object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of the `fields`; JSON leaves open which of two with one name counts."""
    found = dict(fields)
    if len(found) < len(fields):
        names = [name for name, _ in fields]
        raise _Fault(f"has an object with two fields {max(names, key=names.count)!r}")
    return found


def _json_number(digits: str) -> float:
    return int(digits) if len(digits) < 20 else float(digits)  # Python reads no int of more than 4300 digits


def _json_prompts(items: Iterable[tuple[str, Any]]) -> Placed:
    before = None
    for location, item in items:
        if not _is_next_sample(item, before):
            yield location, _json_prompt(item, location)
        before = item


def _is_next_sample(item: Any, before: Any) -> bool:
    """Tells if `item` is about another image of the prompt of the line before, as in `evaluate`'s scores.jsonl."""
    if not (isinstance(item, dict) and isinstance(before, dict) and isinstance(item.get("sample"), int)):
        return False
    return item.get("prompt") == before.get("prompt") and before.get("sample") == item["sample"] - 1


def _json_prompt(item: Any, location: str) -> str:
    prompt = item.get(_prompt_field(list(item), location)) if isinstance(item, dict) else item
    if not isinstance(prompt, str):
        raise _Fault(f"{location} is {reprlib.repr(item)}")
    return prompt


def _prompt_field(names: list[str], location: str) -> str | None:
    """The one of `names` that says that prompts are there."""
    found = [name for name in names if name.strip().lower() in ("prompt", "prompts")]
    if len(found) > 1:
        raise _Fault(f"{location} has {len(found)} fields of prompts: {', '.join(map(repr, found))}")
    return found[0] if found else None


def _from_csv(text: str) -> Placed:
    # The limit is the process's, and there for memory, which the text has taken already: other columns may be long.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True, skipinitialspace=True)
    return _from_table(_csv_rows(reader))


def _csv_rows(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows, each after the line where it begins: a quoted field may have several."""
    first = 1
    try:
        for row in reader:
            yield first, row
            first = reader.line_num + 1
    except csv.Error as error:
        raise _Fault(f"the row at line {first} is no CSV ({error})") from None


def _from_tsv(text: str) -> Placed:
    return _from_table((number, line.split("\t")) for number, line in _lines(text))


def _from_table(rows: Iterable[tuple[int, list[str]]]) -> Placed:
    filled = ((line, row) for line, row in rows if any(map(str.strip, row)))
    _, header = next(filled, (1, []))
    name = _prompt_field(header, "the header")
    if name is None:
        raise _Fault(f"found the columns {reprlib.repr(header)}")
    column = header.index(name)
    for line, row in filled:
        if len(row) > len(header):
            raise _Fault(f"the row at line {line} has {len(row)} fields, the header {len(header)}")
        if len(row) > column:
            yield f"line {line}", row[column]


_JSON = "strings, or objects with a string 'prompt'"
_TEXT: tuple[str, Callable[[str], Placed]] = ("one prompt a line", _from_text)
_KINDS: dict[str, tuple[str, Callable[[str], Placed]]] = {
    ".jsonl": (f"one JSON value a line: {_JSON}", _from_jsonl),
    ".json": (f"a JSON list of {_JSON}", _from_json),
    ".csv": ("a table with a column 'prompt', and fields that have commas or quotes within double quotes", _from_csv),
    ".tsv": ("a table with a column 'prompt', and fields between single tabs", _from_tsv),
}


def prompts_at(prompts: Sequence[str], seed: int, position: int, count: int) -> list[str]:
    """`count` prompts from `position` on, in an endless order that shuffles all prompts anew in every epoch.

    The order is a function of `seed` alone, so that a position is all a checkpoint needs to keep.
    """
    order = grain.MapDataset.source(list(prompts)).shuffle(seed=seed).repeat()
    return [order[index] for index in range(position, position + count)]


def prompts_hash(prompts: Sequence[str]) -> str:
    """SHA-256, in hex, that tells lists of prompts apart: of a UTF-8 text file with one of them a line.

    Where any prompt has a line feed itself, each ends with NUL instead, which no prompt of `read_prompts` has.
    """
    end = "\0" if any("\n" in prompt for prompt in prompts) else "\n"
    return hashlib.sha256("".join(f"{prompt}{end}" for prompt in prompts).encode()).hexdigest()
