"""The one error a user can cause and mend."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any


class UserError(Exception):
    """Bad input. Its message is one line: which key or file, what was found, what would be right.

    The programs print that line without a traceback and exit with code 2.
    """


class ConfigError(UserError):
    """A key of the config is wrong."""

    def __init__(self, key: str, found: Any, expected: str):
        shown = "nothing" if found is dataclasses.MISSING else repr(found)
        super().__init__(f"config.{key}: found {shown}, expected {expected}")
        self.key, self.found, self.expected = key, found, expected


@contextlib.contextmanager
def under(section: str) -> Iterator[None]:
    """Puts `section` before the key of a ConfigError: who reads a section does not know where it stands in the tree."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(section + error.key, error.found, error.expected) from None


def first_line(error: Exception) -> str:
    """The first 100 characters of what a library says went wrong, as far as its first line goes."""
    return str(error).strip().split("\n")[0][:100]


def last_cause(error: Exception) -> str:
    """The last of the causes that TensorStore strings together, without the numbers it adds in brackets."""
    return str(error).rsplit(": ", 1)[-1].split(" [")[0]
