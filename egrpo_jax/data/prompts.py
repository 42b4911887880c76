"""Prompts: where they come from and in which order they are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import grain

from egrpo_jax.data.emoji import heldout_names, train_names
from egrpo_jax.errors import UserError

BUILT_IN: dict[str, Callable[[], Sequence[str]]] = {"emoji_train": train_names, "emoji_heldout": heldout_names}
"""Prompt sets that come with the package."""


def read_prompts(source: str) -> list[str]:
    """The prompts of a built-in set, or of a UTF-8 text file with one prompt a line; blank lines do not count.

    Raises:
      UserError: no such file, not text, or no prompt in it.
    """
    if source in BUILT_IN:
        return list(BUILT_IN[source]())
    try:
        content = Path(source).read_bytes()
    except OSError as error:
        sets = ", ".join(BUILT_IN)
        raise UserError(f"prompt file {source}: {error.strerror}; expected a text file, or one of {sets}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {source}: byte {error.start} is not UTF-8; expected one prompt a line") from None
    if "\0" in text:
        raise UserError(f"prompt file {source}: found a NUL byte, so it is no text; expected one prompt a line")
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"prompt file {source}: found no prompt; expected one prompt a line")
    return prompts


def prompts_at(prompts: Sequence[str], seed: int, position: int, count: int) -> list[str]:
    """`count` prompts from `position` on, in an endless order that shuffles all prompts anew in every epoch.

    The order is a function of `seed` alone, so that a position is all a checkpoint needs to keep.
    """
    order = grain.MapDataset.source(list(prompts)).shuffle(seed=seed).repeat()
    return [order[place] for place in range(position, position + count)]
