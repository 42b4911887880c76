"""What a run writes down: one line of numbers per iteration, seconds per phase, device memory, and an interval.

`metrics.jsonl` is the record; TensorBoard and W&B get the same numbers. It is strict JSON: a number that is not finite
is written as null, which any parser reads, and `read_metrics` gives it back as nan.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorboardX

from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.errors import UserError


class MetricsWriter:
    """Writes `<workdir>/metrics.jsonl`, TensorBoard events in `<workdir>/tb` and, if asked, W&B.

    Only one process of a multi-host run makes one. A run that was killed and resumed ends with the metrics of one that
    was not. (W&B cannot take numbers back: there, repeated iterations keep the values they had first.)
    """

    def __init__(self, workdir: str | os.PathLike[str], resume_step: int | None, wandb: bool = False):
        """Opens the files for appending.

        Args:
          workdir: made if it does not exist.
          resume_step: the last iteration that counts; what was written for later ones is dropped. None: a fresh
            start, all is dropped.

        Raises:
          UserError: if the files cannot be read or written, or `wandb` is asked for and not installed.
        """
        workdir, last = Path(workdir), -1 if resume_step is None else resume_step
        path = workdir / "metrics.jsonl"
        kept = [line for line, values in _complete_lines(path) if values["iteration"] <= last]
        atomic_write(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")
        # The suffix keeps two starts within one second from writing the same file.
        self._tensorboard = tensorboardX.SummaryWriter(
            str(workdir / "tb"), purge_step=last + 1, filename_suffix=f".{uuid.uuid4().hex[:8]}"
        )
        self._wandb = _start_wandb(workdir) if wandb else None

    def write(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Writes the numbers of one iteration, names such as "reward/hps/mean"; on disk when it returns."""
        values = {name: float(value) for name, value in metrics.items()}
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"iteration": iteration, **record}, allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            if math.isfinite(value):  # tensorboardX logs a warning of its own for each that is not
                self._tensorboard.add_scalar(name, value, iteration)
        self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=iteration)

    def close(self) -> None:
        """Closes the files and finishes the W&B run."""
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(workdir: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("W&B was asked for but is not installed: pip install 'egrpo_jax[wandb]'") from None
    identity = workdir / "wandb_id"
    if not identity.exists():
        atomic_write(identity, uuid.uuid4().hex)
    return wandb.init(project="egrpo_jax", name=workdir.name, dir=str(workdir), id=identity.read_text(), resume="allow")


def _complete_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of `path` that was written whole, with its newline, and its values."""
    if not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            return
        try:
            values = json.loads(line)
            values["iteration"]
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}, line {number}: found {line[:60]!r}, expected a JSON object with an iteration"
            ) from None
        yield line, values


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
