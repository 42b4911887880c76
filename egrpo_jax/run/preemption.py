"""Signals that end a run: at once, or at a good moment."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any, Self

import tqdm

from egrpo_jax.parallel import hosts

GRACE = 2.0
"""Seconds in which a process that is to end at once may leave its blocks: a compilation would hold it for minutes."""
_TIMES = 20
_LAST_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class PreemptionGuard:
    """While entered, SIGINT and SIGTERM end the process at once; while `iterating`, the first only sets `requested`.

    So a loop can save and leave at the end of an iteration. A second SIGINT ends it at once then too. At once means
    KeyboardInterrupt or, for SIGTERM, SystemExit with 143; and what has not left its blocks after `GRACE` seconds is
    cut off. Works in the main thread only.

    Python runs handlers between two instructions of the main thread, hence neither while XLA compiles nor while a
    device computes. A thread of our own hears the signals meanwhile. Where Python cannot raise, as in a callback of its
    garbage collection, it drops what a handler raises: the next signal raises anew.

    Attributes:
      requested: the number of the last signal that came while iterating, or None.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._iterating = False
        self._ending: int | None = None
        self._raised: BaseException | None = None
        self._left = threading.Event()

    def __enter__(self) -> Self:
        self._heard, self._hears = os.pipe()
        os.set_blocking(self._hears, False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self._previous: dict[int, Any] = {number: signal.signal(number, self._leave) for number in _LAST_WORDS}
        self._previous_wakeup = signal.set_wakeup_fd(self._hears, warn_on_full_buffer=False)
        self._previous_unraisable, sys.unraisablehook = sys.unraisablehook, self._dropped
        return self

    def __exit__(self, *exception: object) -> None:
        sys.unraisablehook = self._previous_unraisable
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._left.set()
        os.close(self._hears)
        self._thread.join()
        os.close(self._heard)

    @contextlib.contextmanager
    def iterating(self) -> Iterator[None]:
        """The time in which there is an end of an iteration to wait for."""
        self._iterating = True
        try:
            yield
        finally:
            self._iterating = False

    def agree(self) -> int | None:
        """The signal that this or another process of the run was sent; the same for all of them, which all ask."""
        number = hosts.largest(self.requested or 0) or None
        if number is not None:
            self.requested = number
        return number

    def _listen(self) -> None:
        while self._ending is None and (byte := os.read(self._heard, 1)):
            number = byte[0]
            if number not in _LAST_WORDS:
                continue
            if not self._iterating or number == self.requested == signal.SIGINT:
                self._end(number)
            elif number != self.requested:
                self.requested = number
                hint = "; once more to stop at once" if number == signal.SIGINT else ""
                with contextlib.suppress(OSError):
                    tqdm.tqdm.write(f"saving after this iteration{hint}", file=sys.stderr)

    def _end(self, number: int) -> None:
        """Lets the main thread leave, and ends the process if it does not."""
        self._ending = number
        for _ in range(_TIMES):  # one signal may come just before the call of the system that it should break off
            if self._ending:
                signal.pthread_kill(threading.main_thread().ident or 0, number)
            if self._left.wait(GRACE / _TIMES):
                return
        _tell(number)
        os._exit(128 + number)

    def _leave(self, number: int, frame: types.FrameType | None) -> None:
        """Runs in the main thread, after every signal; `_listen` has decided, or will, and then sends it once more."""
        del frame
        if self._ending != number:
            return
        self._ending = 0  # a second exception would only break what the first one tidies up
        if number == signal.SIGTERM and self._raised is None:
            _tell(number)
        self._raised = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        raise self._raised

    def _dropped(self, dropped: sys.UnraisableHookArgs) -> None:
        """Runs where Python drops an exception: if it is ours, `_end`, which still waits, has it raised once more."""
        if dropped.exc_value is not None and dropped.exc_value is self._raised:
            self._ending = signal.SIGINT if isinstance(self._raised, KeyboardInterrupt) else signal.SIGTERM
        else:
            self._previous_unraisable(dropped)


def _tell(number: int) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{_LAST_WORDS[signal.Signals(number)]}\n".encode())
