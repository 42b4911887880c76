"""The config.json beside published weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from egrpo_jax.common.errors import UserError


def read_config(
    folder: str | os.PathLike[str], class_name: str, known: Mapping[str, Any] | None = None, file: str = "config.json"
) -> dict[str, Any]:
    """What `folder/file` says of a model, without the keys that begin with '_'.

    Args:
      folder: a folder as diffusers or transformers write it.
      class_name: the model it must be of: diffusers' `_class_name`, or one of transformers' `architectures` or its
        `model_type`.
      known: every key it may have, with the value that counts where it is absent; a value must be of its default's
        type, of any type if the default is None. None for transformers' configs, which have many keys that say nothing
        about the model: all keys are returned as they are.
      file: a scheduler's is called `scheduler_config.json`.

    Raises:
      UserError: no such file, no JSON object, another model, unknown keys, a value of another type.
    """
    path = Path(folder) / file
    published = read_object(path)
    _check_class(path, published, class_name)
    config = {key: value for key, value in published.items() if not key.startswith("_")}
    if known is None:
        return config
    unknown = sorted(config.keys() - known.keys())
    if unknown:
        raise UserError(f"{path}: unknown {', '.join(unknown)}; a {class_name} has {', '.join(known)}")
    for key, value in config.items():
        if not _fits(value, known[key]):
            raise UserError(f"{path}: {key} is {value!r}; must be of type {type(known[key]).__name__}")
    return {**known, **config}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`. Raises UserError: no such file, or something else in it."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; give a model's folder, whole, as diffusers or transformers write it"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a JSON {type(content).__name__}; must be an object with a model's sizes")
    return content


def _check_class(path: Path, published: Mapping[str, Any], class_name: str) -> None:
    architectures = published.get("architectures")
    named = [
        published.get("_class_name"),
        *(architectures if isinstance(architectures, list) else []),
        published.get("model_type"),
    ]
    if class_name not in named:
        found = next((f"a {name}" for name in named if name is not None), "no model that it names")
        raise UserError(f"{path} is of {found}; must be of a {class_name}")


def _fits(value: Any, default: Any) -> bool:
    """Whether a JSON value is of the type of `default`."""
    match default:
        case None:
            return True
        case bool():
            return isinstance(value, bool)
        case float():
            return isinstance(value, int | float) and not isinstance(value, bool)
        case tuple() | list():
            return isinstance(value, list) and (not default or all(_fits(item, default[0]) for item in value))
        case _:
            return isinstance(value, type(default)) and not isinstance(value, bool)
