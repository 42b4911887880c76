"""Signals that end a run at a good moment."""

from __future__ import annotations

import signal
import types
from typing import Any, Self


class PreemptionGuard:
    """While entered, SIGTERM and the first SIGINT only set `requested`; a second SIGINT raises KeyboardInterrupt.

    So a loop can save and leave at the end of an iteration. Works in the main thread only.

    Attributes:
      requested: the number of the last signal, or None.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        del frame
        if number == self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = number
