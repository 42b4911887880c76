"""Files and folders that are whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from egrpo_jax.common.errors import UserError


def atomic_write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Writes `content` so that `path` is, at any moment and after any kill, the old file or the new one, whole.

    Parent directories are made; text is UTF-8. Raises UserError if `path` cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")  # no longer than most names
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


@contextlib.contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to be filled, which becomes `target` if all goes well and otherwise is removed.

    Raises:
      UserError: `target` exists, or cannot be written, a full disk included.
    """
    target = Path(target)
    if os.path.lexists(target):
        raise UserError(f"{target} exists; name a new folder, or remove it")
    unfinished = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        try:
            unfinished.mkdir(parents=True)
            yield unfinished
            _sync(unfinished)
            unfinished.rename(target)
            _sync(target.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except UserError as error:  # it names a place where nobody will look
        raise UserError(str(error).replace(str(unfinished), str(target))) from error
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror}; choose a folder that can be written, with room"
        ) from None


def check_new_folder(target: str | os.PathLike[str]) -> None:
    """Finds out before hours of work, not after them, whether `new_folder(target)` can succeed. Raises UserError."""
    with new_folder(target) as folder:
        probe = folder / "probe"
        probe.write_bytes(bytes(4096))  # a full disk has room for a folder still
        probe.unlink()
    Path(target).rmdir()


def _sync(folder: Path) -> None:
    """Until a folder is synchronised, a crash may lose the names in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
