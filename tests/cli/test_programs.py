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


BENCHMARKS = [
    path.stem for path in sorted((programs.ROOT / "benchmarks").glob("*.py")) if "__main__" in path.read_text()
]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_of_a_benchmark_ends_well(name):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    done = subprocess.run(command, cwd=programs.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--help" in done.stdout
