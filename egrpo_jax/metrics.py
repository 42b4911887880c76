"""What a run writes down: one line of numbers per iteration, seconds per phase, device memory, and an interval.

`metrics.jsonl` is the record; TensorBoard and W&B get the same numbers. It is strict JSON: a number that is not finite
is written as null, which any parser reads, and `read_metrics` gives it back as nan.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import scipy.special
import tensorboardX
from numpy.typing import ArrayLike

from egrpo_jax.atomic import atomic_write
from egrpo_jax.errors import UserError


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


def paired_interval(before: ArrayLike, after: ArrayLike) -> tuple[float, float]:
    """Mean of the differences after - before, and the half-width of its 95 % interval by Student's t.

    Args:
      before: [P], one value per prompt; nan where there is none, and the prompt is left out.
      after: [P], for the same prompts in the same order.

    Returns:
      (mean, half-width); the half-width is nan for one pair, both are for none.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise ValueError(f"expected two arrays [P], found {before.shape} and {after.shape}")
    change = (after - before)[~np.isnan(after - before)]
    count = change.size
    if count <= 1:
        return float(change[0]) if count else math.nan, math.nan
    quantile = scipy.special.stdtrit(count - 1, 0.975)
    return float(change.mean()), float(quantile * change.std(ddof=1) / math.sqrt(count))


class PhaseTimer:
    """Seconds per phase of one iteration. The caller blocks on the phase's last result inside the phase."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to phase `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """{"seconds/<phase>": seconds} since the last call, and starts anew."""
        seconds, self._seconds = self._seconds, {}
        return {f"seconds/{name}": value for name, value in seconds.items()}


_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bfloat16 operations a second of a chip, from its vendor's data sheet, by the beginning of its name in JAX."""


def peak_flops(device_kind: str) -> float | None:
    """The most bfloat16 operations a second of one chip, or None if it is unknown; the longest fitting name counts."""
    fitting = [name for name in _PEAK_FLOPS if device_kind.startswith(name)]
    return _PEAK_FLOPS[max(fitting, key=len)] if fitting else None


def peak_device_memory() -> float | None:
    """The most bytes in use at once so far on any local device, or None where the backend does not say (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [float(values["peak_bytes_in_use"]) for values in stats if values and "peak_bytes_in_use" in values]
    return max(peaks, default=None)
