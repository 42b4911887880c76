"""The folder of a run and the record of its config."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.errors import UserError, first_line


def check_record(workdir: str | os.PathLike[str], config: Mapping[str, Any], allow_change: bool) -> None:
    """Holds `config` against the record in `workdir`, so that a run only goes on with the config it had.

    A run that has saved nothing yet may start anew with a mended config.

    Args:
      config: nested mappings of JSON values, e.g. `ConfigDict.to_dict()`; tuples count as lists.
      allow_change: the record may differ.

    Raises:
      UserError: the record cannot be read, or differs from `config`.
    """
    workdir = Path(workdir)
    recorded = _read_record(workdir)
    if recorded is None or allow_change or not any((workdir / "checkpoints").glob("[0-9]*")):
        return
    if changes := differences(recorded, json.loads(json.dumps(config))):
        raise UserError(
            f"{workdir} was made with another config: {describe(changes)}; "
            "pass --allow_config_change to go on with the new values, or choose another workdir"
        )


def record_config(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Keeps `config` in `config.json`: what the run in `workdir` is made with. Raises UserError if it cannot."""
    atomic_write(Path(workdir) / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def recorded_config(workdir: str | os.PathLike[str]) -> dict[str, Any]:
    """The config that the run in `workdir` was made with, as `record_config` kept it: nested mappings, lists.

    Raises:
      UserError: there is no record, or it is damaged.
    """
    record = _read_record(Path(workdir))
    if record is None:
        raise UserError(f"found no config.json in {workdir}, expected the workdir of a training run")
    return record


def _read_record(workdir: Path) -> dict[str, Any] | None:
    path = workdir / "config.json"
    try:
        record = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}; expected the config of a training run") from None
    if not isinstance(record, dict):
        raise UserError(f"cannot read {path}: found a {type(record).__name__}, expected the config of a training run")
    return record


def differences(recorded: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[str, str]]:
    """{dotted name: (recorded, given)}, as they are written, of what differs in nested mappings of JSON values."""
    found: dict[str, tuple[str, str]] = {}
    for key in sorted({*recorded, *given}):
        sides = recorded.get(key), given.get(key)
        if isinstance(sides[0], Mapping) and isinstance(sides[1], Mapping):
            found |= differences(sides[0], sides[1], f"{prefix}{key}.")
            continue
        was, now = (repr(values[key]) if key in values else "nothing" for values in (recorded, given))
        if was != now:
            found[prefix + key] = (was, now)
    return found


def describe(changes: Mapping[str, tuple[str, str]]) -> str:
    """The `differences` in words."""
    return "; ".join(f"{key} was {was}, now {now}" for key, (was, now) in changes.items())
