"""Running the programs: as a person does, or, much faster, in this process."""

import contextlib
import importlib
import io
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent


def command(program, *arguments):
    return [sys.executable, "-m", f"egrpo_jax.{program}", *map(str, arguments)]


def run(program, *arguments):
    """The finished process, with what it printed."""
    return subprocess.run(command(program, *arguments), cwd=ROOT, capture_output=True, text=True, check=False)


def call(program, *arguments):
    """The same without a process of its own; a traceback is raised."""
    module = importlib.import_module(f"egrpo_jax.{program}")
    module = importlib.reload(module)  # flags as they are at the start
    argv = [program, *map(str, arguments)]
    out, err, code = io.StringIO(), io.StringIO(), 0
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with contextlib.chdir(ROOT), mock.patch.object(sys, "argv", argv), streams[0], streams[1]:
        try:
            module.cli.run(module.main, module.FLAGS)
        except SystemExit as end:
            code = end.code
    return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())


def start(program, *arguments):
    """A running process that prints nothing."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command(program, *arguments), cwd=ROOT, stdout=quiet, stderr=quiet)
