"""The start and the end of every program: its flags, and a user's mistake or a full disk as one line.

A program has a `FlagValues` of its own, so that several can be imported together.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from egrpo_jax.cli.overrides import read_none
from egrpo_jax.cli.usage import usage
from egrpo_jax.common.errors import UserError

_HELP = {"--help", "-help", "-h", "--helpfull", "-helpfull"}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
read_none()


def define_config(values: flags.FlagValues, required: bool = True) -> flags.FlagHolder[Any]:
    """Defines --config among `values`, and with it --config.KEY for every key of the file; a ConfigDict or None."""
    # New keys are let in, so that `from_config_dict` names the wrong ones, and a dict field can be given more entries.
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file; a part after ':' goes to its get_config. --config.KEY=VALUE after it changes a key.",
        flag_values=values,
        lock_config=False,
        accept_new_attributes=True,
    )
    if required:
        flags.mark_flag_as_required("config", values)
    return holder


def run(main: Callable[[], None], values: flags.FlagValues) -> None:
    """Parses the command line into `values` and calls `main`; --help prints the docstring of its module and the flags.

    What is no bug ends the process with one line on stderr: a `UserError` and a full disk with exit code 2, Ctrl-C with
    130. So does, with 141 and no line, a reader of the output that has gone (`| head`).
    """
    _open_closed_streams()
    with _one_line_for_what_is_no_bug():
        _restore_interrupts()
        _silence_threads_on_a_full_disk()
        try:
            if _HELP & set(sys.argv[1:]):
                print(usage(sys.modules[main.__module__].__doc__ or "", values))
                return
            _parse(values, sys.argv)
            main()
        finally:
            sys.stdout.flush()  # here, where what goes wrong is still told


def _parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """absl's parser, but whatever a flag or a config file does wrong is a UserError. Raises UserError."""
    try:
        extra = values(argv)
        if "config" in values and values["config"].value is not None:
            values["config"].value.keys()  # a file that cannot be read is reported at its first use only
    except UserError:
        raise
    except flags.UnrecognizedFlagError as error:
        if error.flagname.startswith("config."):
            raise UserError(f"--{error.flagname} changes a config file; name that with --config before it") from None
        raise UserError(str(error)) from None
    except flags.Error as error:
        # A TypeError or ValueError of the config file comes as a whole traceback.
        message = f"--config: {_last_line(error)}" if "Traceback" in str(error) else str(error)
        raise UserError(message) from None
    except OSError as error:
        raise UserError(f"--config: {_last_line(error)}") from None
    except Exception as error:  # ml_collections runs the config file while parsing: the user's code raises anything
        raise UserError(f"--config: {type(error).__name__}: {error}") from None
    if extra[1:]:
        raise UserError(f"unexpected argument {extra[1]!r}; every option is a --flag")


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


@contextlib.contextmanager
def _one_line_for_what_is_no_bug() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # another Ctrl-C ends what the interpreter still waits for
        _tell("interrupted")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        _drop_output()
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        full = _full_disk(error)
        line = str(error) if isinstance(error, UserError) else full or _long_name(error)
        if line is None:
            raise
        _tell(f"error: {line}")
        if full is not None:
            os._exit(2)  # what libraries would still write at the end fails as well, with tracebacks
        sys.exit(2)


def _full_disk(error: BaseException | None) -> str | None:
    """The line about a full disk, if that is why `error` came, itself or by what it came from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return f"cannot write{f' {error.filename}' if error.filename else ''}: {error.strerror}"
        if os.strerror(errno.ENOSPC) in str(error):  # as C++ libraries tell it
            return f"cannot write: {os.strerror(errno.ENOSPC)} ({str(error).splitlines()[0][:100]})"
        error = error.__cause__ or error.__context__
    return None


def _long_name(error: Exception) -> str | None:
    """What is said of a path that no file system takes: even to ask whether it exists raises."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{error.filename}: {error.strerror}; expected a path to a file or folder"
    return None


def _silence_threads_on_a_full_disk() -> None:
    """Keeps tracebacks of Orbax and of threads from stderr where the disk is full, of which `run` tells itself."""
    silent = lambda record: not (record.exc_info and _full_disk(record.exc_info[1]))
    logging.getLogger("absl").addFilter(silent)
    usual = threading.excepthook
    threading.excepthook = lambda thread: None if _full_disk(thread.exc_value) else usual(thread)
    # TensorStore's threads report further writes that fail to an event loop that Orbax closed at the first.
    usual_unraisable = sys.unraisablehook
    sys.unraisablehook = lambda late: None if "Event loop is closed" in str(late.exc_value) else usual_unraisable(late)


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):
        print(" ".join(line.split()), file=sys.stderr, flush=True)


def _open_closed_streams() -> None:
    """Leads a stream that was closed (`>&-`) nowhere, lest the first file that is opened takes its number."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115


def _drop_output() -> None:
    """Leads what is still buffered for stdout nowhere, lest it fails again when the interpreter ends."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _restore_interrupts() -> None:
    """Lets Ctrl-C raise KeyboardInterrupt: during imports it ended the process (egrpo_jax/__init__.py).

    Where Python cannot raise, as in callbacks of its garbage collection, of which JAX has one, it would drop it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    usual = sys.unraisablehook
    again = lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def send_again(dropped: sys.UnraisableHookArgs) -> None:
        if isinstance(dropped.exc_value, KeyboardInterrupt):
            threading.Timer(0.05, again).start()
        else:
            usual(dropped)

    sys.unraisablehook = send_again
