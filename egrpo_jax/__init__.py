"""E-GRPO in JAX: docs/architecture.md tells what lies where."""

from __future__ import annotations

import os
import signal
import sys


def _leave(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


# `python -m egrpo_jax.<program>` begins here, seconds of imports before `cli.run`, which gives Ctrl-C its usual meaning
# back. Where the package is only imported, and where Ctrl-C is ignored (nohup), nothing changes.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
