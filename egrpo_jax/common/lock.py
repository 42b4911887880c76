"""Folders that one process at a time may write to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from egrpo_jax.common.errors import UserError


@contextlib.contextmanager
def owned(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Ownership of `folder`, which is made if it does not exist, until the block ends or the process dies.

    The lock is the operating system's (`flock`), on a file `.lock` that says who holds it and goes when the block ends.
    A killed process leaves that file, but not locked. Where NFS is mounted with locks, other hosts are kept out too.
    The package filelock takes the same lock, but does not say who holds it, never removes its file, and where there is
    no `flock` falls back to a lock that outlives a crash.

    Args:
      folder: what is owned; its lock says nothing of the folders in it.
      what: a noun for the folder, for the message: "the workdir".

    Raises:
      UserError: another process, or this one already, owns the folder; or it cannot be written or locked.
    """
    path = Path(folder) / ".lock"
    descriptor = _acquire(path, what)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # what is left of the file locks nothing
            if _lies_at(path, descriptor):
                path.unlink()
        os.close(descriptor)


def _acquire(path: Path, what: str) -> int:
    """The descriptor that holds the lock."""
    while not _lies_at(path, descriptor := _lock(path, what)):
        os.close(descriptor)  # the owner before removed the file between our opening and our locking it
    return descriptor


def _lock(path: Path, what: str) -> int:
    with contextlib.ExitStack() as undo:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            undo.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except BlockingIOError:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise UserError(
                f"{what} {path.parent} is in use by {owner}; wait until it ends, or choose another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot lock {what} {path.parent}: {error.strerror}; choose a folder that can be written and locked"
            ) from None
        undo.pop_all()
    return descriptor


def _lies_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
