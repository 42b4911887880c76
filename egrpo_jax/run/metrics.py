"""Metrics of a run: one line of numbers for each iteration.

`metrics.jsonl` is the record; TensorBoard and W&B get the same numbers. It is strict JSON: a number that is not finite
is written as null, which any parser reads, and `read_metrics` gives it back as nan.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.errors import UserError, first_line


class MetricsWriter:
    """Writes `<workdir>/metrics.jsonl`, TensorBoard events in `<workdir>/tb` and, if asked, W&B.

    Only one process of a multi-host run makes one. A run that was killed and resumed ends with the metrics of one that
    was not. (W&B cannot take numbers back: there, repeated iterations keep the values they had first.)
    """

    def __init__(self, workdir: str | os.PathLike[str], resume_iteration: int | None, wandb: bool = False):
        """Opens the files for appending.

        Args:
          workdir: made if it does not exist.
          resume_iteration: the last iteration that counts; what was written for later ones is dropped. None: a fresh
            start, all is dropped.

        Raises:
          UserError: if the files cannot be read or written, or `wandb` is asked for and not installed.
        """
        self._workdir, last = Path(workdir), -1 if resume_iteration is None else resume_iteration
        path = self._workdir / "metrics.jsonl"
        kept = [line for line, values in _complete_lines(path) if values["iteration"] <= last]
        atomic_write(path, "".join(kept))
        with self._written():
            # Unbuffered: what a full disk refuses is not tried again when the file is closed.
            self._file = path.open("ab", buffering=0)
            self._tensorboard = TensorBoardWriter(self._workdir / "tb", first=last + 1)
        self._wandb = _start_wandb(self._workdir) if wandb else None

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Writes the numbers of one iteration, names such as "reward/hps/mean"; on disk when it returns.

        Raises:
          UserError: they cannot be written, to a full disk, say; the file then still ends with a whole line.
        """
        values = {name: float(value) for name, value in metrics.items()}
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = (json.dumps({"iteration": iteration, **record}, allow_nan=False) + "\n").encode()
        with self._written():
            _append(self._file, line)
            self._tensorboard.write(iteration, {name: value for name, value in values.items() if math.isfinite(value)})
        if self._wandb is not None:
            self._wandb.log(values, step=iteration)

    def close(self) -> None:
        """Closes the files and finishes the W&B run."""
        with self._written():
            self._file.close()
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = error.filename or self._workdir
            raise UserError(f"cannot write metrics in {path}: {error.strerror}") from error


class TensorBoardWriter:
    """Scalars in one new event file, each on disk at once.

    tensorboardX's SummaryWriter leaves that to a thread, which a full disk ends with a traceback.
    """

    def __init__(self, folder: Path, first: int):
        """Makes a file in `folder`, for all from iteration `first` on, which hides what others have of that.

        Raises OSError.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # The suffix keeps two starts within one second from writing the same file.
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{uuid.uuid4().hex[:8]}"
        self._records = RecordWriter(str(folder / name))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))

    def write(self, iteration: int, values: Mapping[str, float]) -> None:
        """Writes finite `values`; on disk when it returns. Raises OSError."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._write(Event(wall_time=time.time(), step=iteration, summary=summary))

    def close(self) -> None:
        """Closes the file."""
        self._records.close()

    def _write(self, event: Event) -> None:
        try:
            self._records.write(event.SerializeToString())
            self._records.flush()
        except OSError:
            with contextlib.suppress(OSError):  # the same again, for what is still in the file's buffer
                self._records.close()
            raise


def _append(file: io.FileIO, content: bytes) -> None:
    """Appends all of `content` to the unbuffered `file`, or nothing. Raises OSError."""
    end, written = file.seek(0, os.SEEK_END), 0
    try:
        while written < len(content):
            written += file.write(content[written:])
    except OSError:
        file.truncate(end)
        raise


def _start_wandb(workdir: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("W&B was asked for but is not installed: pip install 'egrpo_jax[wandb]'") from None
    identity = _wandb_identity(workdir / "wandb_id")
    try:
        return wandb.init(project="egrpo_jax", name=workdir.name, dir=str(workdir), id=identity, resume="allow")
    except wandb.Error as error:  # nobody is logged in, say
        raise UserError(f"W&B: {first_line(error)}; mend that, or set config.wandb to False") from error


def _wandb_identity(path: Path) -> str:
    """What W&B knows the run by: of the file `path`, which is made if it does not exist."""
    try:
        if not path.exists():
            atomic_write(path, uuid.uuid4().hex)
        found = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not re.fullmatch(rb"[0-9a-f]{32}\s*", found):
        raise UserError(f"{path}: found {found[:40]!r}, expected 32 hexadecimal digits; delete it for a new W&B run")
    return found.decode().strip()


def _complete_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of `path` that was written whole, with its newline, and its values."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines[:-1], start=1):  # behind the last newline is nothing, or what a kill cut off
        values = _parse(line)
        if values is None:
            raise UserError(
                f"{path}, line {number}: found {line[:60]!r}, expected a JSON object of numbers with an iteration"
            )
        yield line + "\n", values


def _parse(line: str) -> dict[str, Any] | None:
    """The values of a line, or None if no `MetricsWriter` wrote it."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("iteration")) is not int:
        return None
    return values if all(value is None or type(value) in (int, float) for value in values.values()) else None


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The lines of a `metrics.jsonl`, in order; a last line that is still being written is left out.

    Raises:
      UserError: if there is no such file or a line is not what `MetricsWriter` writes.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return [
        {name: math.nan if value is None else value for name, value in values.items()}
        for _, values in _complete_lines(path)
    ]
