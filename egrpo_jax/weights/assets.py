"""Small parameter trees that ship with the package, one safetensors file each.

Paths of the tree are joined with '/', values are stored as float16 and come back as float32. The header carries the
model's config and the licence, JSON-encoded key by key, so that a file explains itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from egrpo_jax.common.errors import UserError, first_line
from egrpo_jax.models.flux import FluxConfig
from egrpo_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from egrpo_jax.models.towers import Tower, TowerConfig

Params = dict[str, Any]


def asset_path(name: str) -> Path:
    """The path of the file `name` among the package's assets, whether it is there or not."""
    return Path(__file__).parent.parent / "assets" / name


def save_asset(path: str | os.PathLike[str], params: Params, metadata: Mapping[str, Any]) -> None:
    """Writes `params` (a nested dict of arrays) as float16, and `metadata` (JSON values), all or nothing.

    Raises:
      UserError: the folder is missing or may not be written to.
    """
    path = Path(path)
    flat = {key: np.asarray(value, np.float16) for key, value in flatten_dict(params, sep="/").items()}
    header = {key: json.dumps(value) for key, value in metadata.items()}
    try:
        # In the same folder, so that the rename cannot leave half a file.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            unfinished.write_bytes(save(flat, metadata=header))
            unfinished.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that exists and is writable") from None


def load_asset(path: str | os.PathLike[str]) -> tuple[Params, dict[str, Any]]:
    """The float32 parameter tree and the metadata that `save_asset` wrote.

    Raises:
      UserError: the file is missing or damaged; names it and says what to do.
    """
    return _read(path, lambda file, key: file.get_tensor(key).astype(np.float32))


def read_header(path: str | os.PathLike[str]) -> tuple[Params, dict[str, Any]]:
    """The result of `load_asset`, but `jax.ShapeDtypeStruct` in place of arrays: only the header is read.

    Raises:
      UserError: as `load_asset`.
    """
    return _read(path, lambda file, key: jax.ShapeDtypeStruct(file.get_slice(key).get_shape(), np.float32))


def _read(path: str | os.PathLike[str], leaf: Callable[[Any, str], Any]) -> tuple[Params, dict[str, Any]]:
    try:
        with safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            flat = {key: leaf(file, key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = {key: json.loads(value) for key, value in header.items()}
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {_REMEDY}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no readable asset ({first_line(error)}); {_REMEDY}") from None
    return unflatten_dict(flat, sep="/"), metadata


_REMEDY = "reinstall egrpo_jax, or make it with python -m egrpo_jax.pretrain"


@contextlib.contextmanager
def _explained(path: str | os.PathLike[str], kind: str) -> Iterator[None]:
    """Raises UserError in place of whatever comes of metadata that are not those of a `kind`."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a {kind} ({first_line(error)}); {_REMEDY}") from None


def load_text_encoder(folder: str | os.PathLike[str] | None = None) -> tuple[TextEncoder, Params]:
    """The embedded text encoder and its parameters, from `folder` or the package's assets."""
    path = _path("text_encoder.safetensors", folder)
    params, metadata = load_asset(path)
    with _explained(path, "text encoder"):
        return TextEncoder(TextEncoderConfig(**metadata["config"])), params


def load_tower(name: str, folder: str | os.PathLike[str] | None = None) -> tuple[Tower, Params]:
    """An embedded tower, `reward`, `judge` or `weak`, and its parameters."""
    path = _path(f"{name}.safetensors", folder)
    params, metadata = load_asset(path)
    with _explained(path, "tower"):
        return Tower(TowerConfig(**metadata["config"])), params


def _path(file: str, folder: str | os.PathLike[str] | None) -> Path:
    return asset_path(file) if folder is None else Path(folder) / file


@dataclasses.dataclass(frozen=True)
class FlowAsset:
    """The embedded flow model in the file `path`: `params`, as `jax.ShapeDtypeStruct`, of `Flux(config)` over `grid`
    patches of `patch` pixels."""

    path: Path
    config: FluxConfig
    params: Params
    patch: int
    grid: tuple[int, int]


def read_flow(path: str | os.PathLike[str] | None = None) -> FlowAsset:
    """Describes the embedded flow model, or the one that `pretrain` wrote to `path`; `load_asset` gives its weights.

    Raises:
      UserError: as `load_asset`.
    """
    file = asset_path("flow.safetensors") if path is None else Path(path)
    params, metadata = read_header(file)
    with _explained(file, "flow model"):
        config = dict(metadata["config"], axes_dims=tuple(metadata["config"]["axes_dims"]))
        return FlowAsset(file, FluxConfig(**config), params, metadata["patch"], tuple(metadata["grid"]))
