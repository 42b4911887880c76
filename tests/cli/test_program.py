import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import egrpo_jax
from tests import programs

PROGRAM = '''
"""Prints a job."""
import errno
import os
import signal
import sys
import threading
from absl import flags, logging
from egrpo_jax import cli
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.errors import UserError
from job import Job

FLAGS = flags.FlagValues()
CONFIG = cli.define_config(FLAGS)
TO = flags.DEFINE_enum("to", "here", ["here", "there"], "Where it is printed.", flag_values=FLAGS)

def full():
    raise OSError(errno.ENOSPC, "No space left on device", "weights.bin")

def main():
    job = from_config_dict(Job, CONFIG.value)
    if job.steps == 13:
        raise UserError("thirteen steps\\nare too many")
    if job.steps == 14:
        raise RuntimeError("a bug")
    if job.steps == 15:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    if job.steps == 22:
        class Finalized:
            def __del__(self):  # Python drops what is raised here
                os.kill(os.getpid(), signal.SIGINT)
                signal.pause()
        Finalized()
        signal.pause()
    if job.steps == 16:
        full()
    if job.steps == 17:
        try:
            raise ValueError("RESOURCE_EXHAUSTED: write: No space left on device [source]\\nmore")
        except ValueError as error:
            raise RuntimeError("cannot save") from error
    if job.steps == 19:
        try:
            full()
        except OSError:
            logging.exception("a writer in the background failed")
        thread = threading.Thread(target=full)
        thread.start()
        thread.join()
        full()
    if job.steps == 21:
        class Late:
            def __del__(self):  # what it raises nobody can catch, as what TensorStore's threads do
                raise RuntimeError("Event loop is closed")
        Late()
        full()
    if job.steps == 20:
        os.stat("x" * 300)
    for _ in range(job.steps // 1000):
        print("x" * 1000)
    if job.steps == 18:
        with open("opened", "w") as file:
            print(file.fileno(), file=file)
    print(job)

if __name__ == "__main__":
    cli.run(main, FLAGS)
'''
JOB = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 0.1

@dataclasses.dataclass(frozen=True)
class Job:
    steps: int = 10
    clip: float | None = None
    active: tuple[int, ...] = (0,)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    optim: Optim = Optim()
    path: str | None = None
    limit: int | None = None
    shape: tuple[int, ...] | None = None
    base: Optim | None = None
"""
CONFIG = """
from egrpo_jax.common.config import to_config_dict
from egrpo_jax.common.errors import UserError
from job import Job

def get_config(arg="10"):
    if not arg.isdigit():
        raise UserError(f"argument {arg!r} of this config, expected a number of steps")
    return to_config_dict(Job(steps=int(arg)))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("program")
    files = {
        "program.py": PROGRAM,
        "job.py": JOB,
        "good.py": CONFIG,
        "syntax.py": "def get_config(:\n    pass\n",
        "name.py": "def get_config():\n    return missing\n",
        "typed.py": CONFIG.replace("return", "config =") + "    config.optim.lr = 'x'\n    return config\n",
        "empty.py": "",
        "set.py": CONFIG.replace("steps=int(arg)", "1, 0.5, path='x', limit=2, shape=(3,), base=Optim(0.2)").replace(
            "import Job", "import Job, Optim"
        ),
    }
    for name, content in files.items():
        (folder / name).write_text(content)
    return folder


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(egrpo_jax.__file__).parents[1])}


def finished(command, folder, environment):
    """Ctrl-C means what it does in a terminal, even where these tests run in the background, which ignores it."""
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, preexec_fn=heed
    )


def start(folder, *arguments):
    return finished([sys.executable, "program.py", *arguments], folder, ENVIRONMENT)


def shell(folder, line):
    """What a line of the shell prints to stderr, and its exit status."""
    line = line.replace("PROGRAM", f"{sys.executable} program.py --config=good.py")
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    return done.stderr, done.returncode


def test_runs_with_overrides(folder):
    result = start(
        folder, "--config=good.py:7", "--config.clip=2", "--config.active=3,4", "--config.weights.hps=1",
        "--config.optim.lr", "0.5",
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    expected = (
        "Job(steps=7, clip=2.0, active=(3, 4), weights={'hps': 1.0}, optim=Optim(lr=0.5), path=None, limit=None, "
    )
    assert result.stdout == expected + "shape=None, base=None)\n"


OPTIONAL = ("clip", "path", "limit", "shape", "base")


def test_optional_keys_are_set_back_to_none(folder):
    kept = start(folder, "--config=set.py", "--config.base={'lr': 0.3}", "--config.limit=5", "--config.clip=1.5")
    assert "clip=1.5, active" in kept.stdout, kept.stderr
    assert kept.stdout.endswith("path='x', limit=5, shape=(3,), base=Optim(lr=0.3))\n")
    result = start(folder, "--config=set.py", *(f"--config.{key}=None" for key in OPTIONAL))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("=None") == len(OPTIONAL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config=good.py", "--config.nope=1"],
            "config.nope: found 1, expected one of the keys active, base, clip, ",
        ),
        (["--config=good.py", "--config.optim.l=1"], "config.optim.l: found 1, expected one of the keys lr"),
        (["--config=good.py", "--config.nope.deep=1"], "--config: "),
        (["--config.steps=1"], "--config.steps changes a config file; name that with --config before it"),
        (["--config=good.py", "--config.steps=many"], "flag --config.steps=many: "),
        (["--config=good.py", "--config.active=a"], "config.active[0]: found 'a', expected a value of type int"),
        (["--config=good.py", "--config.steps=None"], "config.steps: found None, expected a value of type int"),
        (["--config=good.py", "--config.active=None"], "config.active[0]: found None, expected a value of type int"),
        (["--config=good.py", "--config.optim=None"], "config.optim: found None, expected a value of type Optim"),
        (["--config=good.py", "--config.optim=3"], "flag --config.optim=3: expected a section, as {'key': value}, or"),
        (["--config=good.py", "--config.steps"], "Missing value for flag --config.steps"),
        (["--config=good.py:ten"], "argument 'ten' of this config, expected a number of steps"),
        (["--config=good.py:13"], "thirteen steps are too many"),
        (["--config=missing.py"], "--config: [Errno 2] No such file or directory: 'missing.py'"),
        (["--config=syntax.py"], "--config: SyntaxError: invalid syntax (syntax.py, line 1)"),
        (["--config=name.py"], "--config: NameError: name 'missing' is not defined"),
        (["--config=typed.py"], "--config: TypeError: Could not override field 'lr'"),
        (["--config=empty.py"], "--config: AttributeError: "),
        (["--config="], "--config: "),
        (["--config=good.py", "--nope=1"], "Unknown command line flag 'nope'"),
        (["--config=good.py", "stray"], "unexpected argument 'stray'; every option is a --flag"),
        ([], "flag --config=None: Flag --config must have a value other than None."),
    ],
)
def test_a_mistake_is_one_line(folder, arguments, message):
    result = start(folder, *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_a_name_that_is_too_long_is_one_line(folder):
    result = start(folder, "--config=good.py:20")
    message = f"error: {'x' * 300}: File name too long; expected a path to a file or folder\n"
    assert (result.returncode, result.stderr) == (2, message)


def test_a_bug_keeps_its_traceback(folder):
    result = start(folder, "--config=good.py:14")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "RuntimeError: a bug" in result.stderr


@pytest.mark.parametrize("flag", ["--help", "--helpfull", "-h"])
def test_help_is_the_docstring_and_the_flags(folder, flag):
    result = start(folder, flag)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Prints a job.\n")
    for part in ("--config\n", "--to\n", "<here|there>: Where it is printed. (default: here)"):
        assert part in result.stdout


@pytest.mark.parametrize("steps", [15, 22])
def test_ctrl_c_is_one_line(folder, steps):
    result = start(folder, f"--config=good.py:{steps}")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_ctrl_c_during_imports_is_one_line(tmp_path):
    (tmp_path / "jax.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    result = finished(programs.command("sample"), programs.ROOT, os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_importing_the_package_leaves_ctrl_c_alone():
    own = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    same = "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", f"{own}; import egrpo_jax; {same}"], cwd=programs.ROOT, check=True)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (16, "cannot write weights.bin: No space left on device"),
        (19, "cannot write weights.bin: No space left on device"),
        (21, "cannot write weights.bin: No space left on device"),
        (17, "cannot write: No space left on device (RESOURCE_EXHAUSTED: write: No space left on device [source])"),
    ],
)
def test_a_full_disk_is_one_line(folder, steps, message):
    result = start(folder, f"--config=good.py:{steps}")
    assert (result.returncode, result.stderr) == (2, f"error: {message}\n")


@pytest.mark.parametrize("steps", [10, 1_000_000])  # the output comes at the end, and on the way
def test_output_that_nobody_reads_ends_the_program_silently(folder, steps):
    assert shell(folder, f"PROGRAM:{steps} | true; exit ${{PIPESTATUS[0]}}") == ("", 141)


@pytest.mark.parametrize("steps", [10, 1_000_000])
def test_output_to_a_full_disk_is_one_line(folder, steps):
    assert shell(folder, f"PROGRAM:{steps} > /dev/full") == (
        "error: cannot write: No space left on device\n",
        2,
    )


def test_a_closed_output_does_no_harm(folder):
    assert shell(folder, "PROGRAM:18 >&-") == ("", 0)
    assert int((folder / "opened").read_text()) > 2
    assert shell(folder, "PROGRAM:13 2>&-") == ("", 2)
