"""Files that are whole or not there."""

import pytest

from egrpo_jax.common.atomic import atomic_write
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
