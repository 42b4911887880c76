"""What all programs have in common."""

import importlib

import pytest

from tests import programs
from tests.test_imports import PROGRAMS


def test_all_can_be_imported_together():
    modules = [importlib.import_module(f"egrpo_jax.{name}") for name in PROGRAMS]
    assert len({id(module.FLAGS) for module in modules}) == len(PROGRAMS)


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_help_shows_how_to_start_it(name):
    done = programs.call(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"    python -m egrpo_jax.{name} --" in done.stdout
    assert "  --config\n" in done.stdout
