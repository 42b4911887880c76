"""One owner of a folder: against real processes, one of which is killed."""

import contextlib
import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys

import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.lock import owned
from tests.programs import ROOT

HOLD = """
import sys
from egrpo_jax.common.lock import owned
with owned(sys.argv[1], "the folder"):
    print("held", flush=True)
    sys.stdin.read()
"""
COUNT = """
import pathlib, sys
from egrpo_jax.common.errors import UserError
from egrpo_jax.common.lock import owned
counter, done = pathlib.Path(sys.argv[1] + ".txt"), 0
while done < 50:
    try:
        with owned(sys.argv[1], "the folder"):
            counter.write_text(str(int(counter.read_text()) + 1))
            done += 1
    except UserError:
        pass
"""


def python(code, *arguments):
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


@pytest.fixture
def holder(tmp_path):
    """A process that owns `tmp_path / "out"` until its standard input ends."""
    with python(HOLD, str(tmp_path / "out")) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def take(folder):
    with owned(folder, "the folder"):
        pass


def test_a_second_process_is_told_who_owns_it(tmp_path, holder):
    owner = rf"process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(UserError, match=rf"^the folder .*out is in use by {owner}; wait until it ends, or choose"):
        take(tmp_path / "out")
    take(tmp_path / "other")
    holder.communicate()
    take(tmp_path / "out")


def test_a_kill_releases_it(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with owned(tmp_path / "out", "the folder"), pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        take(tmp_path / "out")


def test_nothing_is_left_of_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), owned(tmp_path / "made" / "too", "the folder"):
        raise KeyboardInterrupt
    assert list((tmp_path / "made" / "too").iterdir()) == []
    with owned(tmp_path, "the folder"):
        (tmp_path / ".lock").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_many_processes_take_turns(tmp_path):
    (tmp_path / "out.txt").write_text("0")
    processes = [python(COUNT, str(tmp_path / "out")) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert (tmp_path / "out.txt").read_text() == "150"


def test_a_file_removed_between_opening_and_locking_is_not_the_lock(tmp_path, monkeypatch):
    flock, path = fcntl.flock, tmp_path / ".lock"

    def late(*arguments):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    with owned(tmp_path, "the folder"), pytest.raises(UserError, match="in use"):
        take(tmp_path)


def test_the_lock_of_a_folder_made_anew_is_not_removed(tmp_path):
    with contextlib.ExitStack() as second:
        with owned(tmp_path, "the folder"):
            (tmp_path / ".lock").unlink()
            second.enter_context(owned(tmp_path, "the folder"))
        with pytest.raises(UserError, match="in use"):
            take(tmp_path)


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            UserError, match=r"^cannot lock the folder .*(exists|Not a dir.*); choose a folder that can"
        ):
            take(folder)


@pytest.mark.parametrize(
    ("module", "call", "number"),
    [(os, "open", errno.EROFS), (fcntl, "flock", errno.ENOSYS), (os, "pwrite", errno.ENOSPC)],
)
def test_a_file_system_that_refuses(tmp_path, monkeypatch, module, call, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(module, call, refuse)
        with pytest.raises(UserError, match=rf"^cannot lock the folder .*: {os.strerror(number)}; choose a folder"):
            take(tmp_path)
    take(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match=r"^cannot lock the folder .*: Permission denied"):
        take(tmp_path)
