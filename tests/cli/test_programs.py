"""What all programs have in common."""

import importlib
import subprocess
import sys

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


@pytest.mark.parametrize("path", sorted((programs.ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_help_of_a_benchmark_ends_well(path):
    done = subprocess.run([sys.executable, path, "--help"], cwd=programs.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--help" in done.stdout
