"""How every program starts: flags, and what happens with a user's mistake."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from egrpo_jax.cli.overrides import read_none
from egrpo_jax.common.errors import UserError

# New keys are let in here, so that `from_config_dict` names the wrong ones, and a dict field can be given more entries.
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config file; a part after ':' goes to its get_config.",
    lock_config=False,
    accept_new_attributes=True,
)
read_none()


def run(main: Callable[[], None], required: Sequence[str] = ("config",)) -> None:
    """Parses the flags and calls `main`; a `UserError` becomes one line on stderr and exit code 2."""
    flags.mark_flags_as_required(required)
    app.run(lambda _: _exit_on_user_error(main), flags_parser=_parse_flags)


def _exit_on_user_error(main: Callable[[], None]) -> None:
    try:
        main()
    except UserError as error:
        _fail(error)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, but whatever a flag or a config file does wrong is one line, not a traceback."""
    try:
        extra = flags.FLAGS(argv)
        if CONFIG.value is not None:
            CONFIG.value.keys()  # a file that cannot be read is reported at its first use only
    except UserError as error:
        _fail(error)
    except flags.Error as error:
        # A TypeError or ValueError of the config file comes as a whole traceback.
        _fail(f"--config: {_last_line(error)}" if "Traceback" in str(error) else error)
    except OSError as error:
        _fail(f"--config: {_last_line(error)}")
    except Exception as error:  # ml_collections runs the config file while parsing: the user's code raises anything
        _fail(f"--config: {type(error).__name__}: {error}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step at level INFO
    if extra[1:]:
        _fail(f"unexpected argument {extra[1]!r}; every option is a --flag")
    return extra


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _fail(error: object) -> NoReturn:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)
