"""Files that are whole or not there."""

import errno
from pathlib import Path

import pytest

from egrpo_jax.common.atomic import atomic_write, check_new_folder, new_folder
from egrpo_jax.common.errors import UserError


def test_atomic_write(tmp_path):
    path = tmp_path / "deep" / "file"
    atomic_write(path, "näme\n")
    assert path.read_bytes() == "näme\n".encode()
    atomic_write(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(UserError, match="cannot write"):
        atomic_write(path.parent, "a directory is there")
    assert list(tmp_path.iterdir()) == [path.parent]


def test_a_name_as_long_as_the_system_allows(tmp_path):
    path = tmp_path / ("n" * 255)
    atomic_write(path, "whole")
    assert path.read_text() == "whole"


def test_a_file_of_a_new_folder_goes_by_its_name_there(tmp_path):
    def fill():
        with new_folder(tmp_path / "new") as folder:
            (folder / "file").write_text("")
            atomic_write(folder / "file" / "table.md", "x")

    with pytest.raises(UserError, match=f"^cannot write {tmp_path}/new/file/table.md: File exists$"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_has_no_room_for_a_new_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)  # a folder alone can still be made
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/new: No space left on device"):
        check_new_folder(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
