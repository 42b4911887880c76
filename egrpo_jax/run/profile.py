"""A profile of some iterations: what the devices and the host did when."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import jax

from egrpo_jax.common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Window:
    """Iterations to profile, counted from 1, both included."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Window:
        """The window of "FIRST:LAST". Raises UserError."""
        found = re.fullmatch(r"([1-9]\d{0,8}):([1-9]\d{0,8})", text)
        if found is None or int(found[1]) > int(found[2]):
            raise UserError(f"--profile: found {text!r}, expected the first and the last of some iterations, as in 3:5")
        return cls(int(found[1]), int(found[2]))

    def check(self, done: int, total: int) -> None:
        """Raises UserError unless all of the window is to come in a run that has `done` of `total` iterations."""
        if self.first <= done or self.last > total:
            raise UserError(
                f"--profile: found {self.first}:{self.last}, expected iterations from {done + 1} to {total}, which "
                "this run has before it"
            )


class Profiler:
    """Writes the profile of a window of iterations, in which each step of the method has its named scope.

    Nothing is written for none.
    """

    def __init__(self, window: Window | None, folder: Path):
        """`folder`: where TensorBoard looks."""
        self._window, self._folder, self._running = window, folder, False

    @contextlib.contextmanager
    def iteration(self, number: int) -> Iterator[None]:
        """Profiles what is done inside, if iteration `number` is in the window."""
        if self._window is not None and number == self._window.first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of a Python function would drown the phases
            jax.profiler.start_trace(self._folder, profiler_options=options)
            self._running = True
        with jax.profiler.StepTraceAnnotation("iteration", step_num=number):
            yield
        if self._window is not None and number == self._window.last:
            self.close()

    def close(self) -> None:
        """Writes what there is of a window that was broken off."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
