"""The end of a block, whichever it is, without hiding why it came."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def finishing(finish: Callable[[], None]) -> Iterator[None]:
    """Calls `finish` at the end of the block; after an error, one that `finish` raises is only noted on the first.

    `contextlib.closing` and `finally` put the second in place of the first: a run would tell that its last save failed,
    and not why it ended.
    """
    try:
        yield
    except BaseException as error:
        try:
            finish()
        except Exception as second:
            error.add_note(f"then: {second}")
        raise
    finish()
