"""The config.json beside published weights: read, and checked key by key against a table before a value is used.

A table names each key with the kind of value it may have and the value that counts where it is absent. What one key
says of another is for the reader of that model to check, with `Published.error` for what is wrong.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from egrpo_jax.common.errors import UserError
from egrpo_jax.weights.files import shorten

LARGEST = 2**24
"""No size of a model is above it; arrays beyond it fail in ways that no one connects with a config."""

_SHOWN = 80  # characters of a value in an error


@dataclasses.dataclass(frozen=True)
class Kind:
    """The JSON values that a key may have: those that `fits` takes, `expected` in the words of an error."""

    expected: str
    fits: Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max  # not math.isfinite, which fails for large integers


SIZE = Kind("a positive integer", lambda value: _whole(value) and 0 < value <= LARGEST)
EVEN = Kind("a positive, even integer", lambda value: SIZE.fits(value) and value % 2 == 0)
TOKEN_ID = Kind("a token's id, an integer from 0", lambda value: _whole(value) and 0 <= value <= LARGEST)
NUMBER = Kind("a finite number", _finite)
POSITIVE = Kind("a positive, finite number", lambda value: _finite(value) and value > 0)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
ANYTHING = Kind("anything", lambda _: True)


def one_of(*values: Any) -> Kind:
    """The kind of these values alone; 1 is not true, nor 0 false."""
    fits = lambda found: any(found == value and isinstance(found, bool) == isinstance(value, bool) for value in values)
    return Kind(" or ".join(json.dumps(value) for value in values), fits)


def nullable(kind: Kind) -> Kind:
    """`kind` or null."""
    return Kind(f"{kind.expected}, or null", lambda value: value is None or kind.fits(value))


def list_of(kind: Kind, count: int | None = None) -> Kind:
    """Lists of `kind`: of `count` items, or of any number but none."""

    def fits(value: Any) -> bool:
        items = value if isinstance(value, list | tuple) else ()
        return bool(items) and len(items) == (count or len(items)) and all(map(kind.fits, items))

    return Kind(f"a list{f' of {count}' if count else ''}, each {kind.expected}", fits)


_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a table: the kind of its values, and the one that counts where it is absent; without, it must be there.

    A default need not be of the kind: then the key must be there too, and say something else.
    """

    kind: Kind
    default: Any = _REQUIRED


class Published(dict[str, Any]):
    """The keys of a published JSON file, or of a section of it.

    Attributes:
      file: the file, as errors name it.
      prefix: what errors put before a key: the section's name and a dot.
    """

    def __init__(self, values: Mapping[str, Any], file: str = "config.json", prefix: str = "") -> None:
        super().__init__(values)
        self.file, self.prefix = file, prefix

    def checked(self, keys: Mapping[str, Key], strict: bool = False) -> Published:
        """The entries of `keys` alone, with their defaults where they are absent.

        Args:
          keys: the table.
          strict: refuse keys beyond the table, apart from those that begin with '_'; else they are left out.

        Raises:
          UserError: a key is missing, unknown, or has a value of another kind.
        """
        unknown = sorted(key for key in self.keys() - keys.keys() if not key.startswith("_"))
        if strict and unknown:
            named = shorten([self.prefix + key for key in unknown])
            raise UserError(f"{self.file}: unknown {named}; this kind of model has {', '.join(keys)}")
        values = {key: self.get(key, entry.default) for key, entry in keys.items()}
        for key, entry in keys.items():
            if values[key] is _REQUIRED or not entry.kind.fits(values[key]):
                raise Published(values, self.file, self.prefix).error(key, entry.kind.expected)
        return Published(values, self.file, self.prefix)

    def section(self, key: str) -> Published:
        """The object under `key`; empty where it is absent or null. Raises UserError: it is no object."""
        value = self.get(key)
        if not nullable(OBJECT).fits(value):
            raise self.error(key, OBJECT.expected)
        return Published(value or {}, self.file, f"{self.prefix}{key}.")

    def error(self, key: str, expected: str) -> UserError:
        """The error that `key` should be `expected`; says what it is, or that it is missing."""
        value = self.get(key, _REQUIRED)
        found = "missing" if value is _REQUIRED else json.dumps(value)
        shown = found if len(found) <= _SHOWN else f"{found[:_SHOWN]}..."
        return UserError(f"{self.file}: {self.prefix}{key} is {shown}; must be {expected}")


def read_config(folder: str | os.PathLike[str], class_name: str, file: str = "config.json") -> Published:
    """The keys of `folder/file`.

    Args:
      folder: a folder as diffusers or transformers write it.
      class_name: the model it must be of: diffusers' `_class_name`, or one of transformers' `architectures` or its
        `model_type`.
      file: a scheduler's is called `scheduler_config.json`.

    Raises:
      UserError: no such file, no JSON object, another model.
    """
    path = Path(folder) / file
    published = read_object(path)
    _check_class(path, published, class_name)
    return published


def read_object(path: Path) -> Published:
    """The JSON object in the file `path`. Raises UserError: no such file, or something else in it."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; give a model's folder, whole, as diffusers or transformers write it"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; must be an object with a model's sizes")
    return Published(content, str(path))


def _check_class(path: Path, published: Mapping[str, Any], class_name: str) -> None:
    architectures = published.get("architectures")
    named = [
        published.get("_class_name"),
        *(architectures if isinstance(architectures, list) else []),
        published.get("model_type"),
    ]
    if class_name not in named:
        found = next((f"a {name}" for name in named if name is not None), "no model that it names")
        raise UserError(f"{path} is of {found}; must be of a {class_name}")
