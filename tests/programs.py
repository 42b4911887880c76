"""Running the programs as a person does."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def command(program, *arguments):
    return [sys.executable, "-m", f"egrpo_jax.{program}", *map(str, arguments)]


def run(program, *arguments):
    """The finished process, with what it printed."""
    return subprocess.run(command(program, *arguments), cwd=ROOT, capture_output=True, text=True, check=False)


def start(program, *arguments):
    """A running process that prints nothing."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command(program, *arguments), cwd=ROOT, stdout=quiet, stderr=quiet)
