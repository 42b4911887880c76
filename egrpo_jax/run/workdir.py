"""The folder of a run and the record of its config."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.errors import UserError, first_line


def claim_workdir(workdir: str | os.PathLike[str], config: Mapping[str, Any], allow_change: bool) -> None:
    """Makes `workdir` and keeps `config` in its `config.json`, so that a run only goes on with the config it had.

    Args:
      config: nested mappings of JSON values, e.g. `ConfigDict.to_dict()`; tuples count as lists.
      allow_change: replace a record that differs.

    Raises:
      UserError: if the directory cannot be written, its record cannot be read, or differs from `config`.
    """
    path = Path(workdir) / "config.json"
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    if path.exists():
        try:
            recorded = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {first_line(error)}; delete it to record this config anew") from error
        differences = _differences(_flatten(recorded), _flatten(json.loads(text)))
        if not differences:
            return
        if not allow_change:
            raise UserError(
                f"{workdir} was made with another config: {'; '.join(differences)}; "
                "pass --allow_config_change to go on with the new values, or choose another workdir"
            )
    atomic_write(path, text)


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of nested mappings; an empty mapping is a value."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    flat = {}
    for key, value in config.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else key))
    return flat


def _differences(recorded: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    def show(values: Mapping[str, Any], key: str) -> str:
        return repr(values[key]) if key in values else "nothing"

    keys = sorted(key for key in {*recorded, *config} if show(recorded, key) != show(config, key))
    return [f"{key} was {show(recorded, key)}, now {show(config, key)}" for key in keys]
