"""The text of --help."""

from __future__ import annotations

import textwrap
from typing import Any

from absl import flags

_INDENT = " " * 6


def usage(description: str, values: flags.FlagValues) -> str:
    """`description`, and every flag of `values` in the order in which they were defined."""
    return "\n".join([description.strip(), "", "Flags:", *(_entry(values[name]) for name in values), "  --help"])


def _entry(flag: flags.Flag[Any]) -> str:
    default = "" if flag.default is None else f" (default: {flag.default})"
    text = " ".join(f"{flag.help}{default}".split())
    wrapped = textwrap.fill(text, 100, initial_indent=_INDENT, subsequent_indent=_INDENT)
    return f"  --{'[no]' if flag.boolean else ''}{flag.name}\n{wrapped}"
