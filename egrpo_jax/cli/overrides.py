"""None as an override: `--config.plan.entropy_threshold=None` sets an optional key back.

ml_collections reads an override as the type of what the config file holds there, and None is of none of them. Whether a
key may be None at all, `from_config_dict` decides.
"""

from __future__ import annotations

import ast
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags


class OrNone(flags.ArgumentParser):
    """`parser`, that also reads "None"."""

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser

    def parse(self, argument: Any) -> Any:
        """Reads "None", or whatever the parser behind it takes. Raises ValueError as that does."""
        return None if argument == "None" else self._parser.parse(argument)

    def flag_type(self) -> str:
        """Returns the kind of value, for people."""
        return self._parser.flag_type()


class SectionParser(flags.ArgumentParser):
    """A whole section, written as a dict; the config file's own passes as it is."""

    def parse(self, argument: Any) -> ml_collections.ConfigDict:
        """Reads a dict. Raises ValueError if it is none."""
        if isinstance(argument, ml_collections.ConfigDict):
            return argument
        try:
            value = ast.literal_eval(argument)
        except (SyntaxError, ValueError):
            value = None
        if not isinstance(value, dict):
            raise ValueError("expected a section, as {'key': value}, or one key of it after a dot")
        return ml_collections.ConfigDict(value)

    def flag_type(self) -> str:
        """Returns the kind of value, for people."""
        return "section"


def read_none() -> None:
    """Lets overrides of all config flags be None; tuples come as `(None,)`, which `from_config_dict` knows."""
    for kind, parser in (
        (float, flags.FloatParser()),
        (int, flags.IntegerParser()),
        (str, flags.ArgumentParser()),
        (ml_collections.ConfigDict, SectionParser()),
    ):
        config_flags.register_flag_parser_for_type(kind, OrNone(parser))
