"""Weights as diffusers and transformers keep them: a folder with config.json and safetensors, sharded where large.

The folder appears whole under its name or not at all, and the host holds one tensor at a time. That is why files are
written here: the library's `save_file` takes all tensors of a file at once, 10 GB of them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from egrpo_jax.common.atomic import new_folder
from egrpo_jax.weights.files import DTYPES, STEMS

Shapes = Mapping[str, tuple[int, ...]]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes; where tensors begin


def export_folder(
    target: str | os.PathLike[str],
    tensors: Iterable[tuple[str, np.ndarray]],
    shapes: Shapes,
    config: Mapping[str, Any],
    dtype: Any,
    stem: str = STEMS[0],
    max_shard_bytes: int = 10 * 10**9,
) -> None:
    """Writes `tensors` and `config` into the new folder `target`.

    Args:
      target: must not exist; folders above it are made.
      tensors: names and tensors, in the order of `shapes`, such as `layout.export_tensors` gives; taken one by one.
      shapes: the shape of every tensor, such as `layout.published_shapes` gives.
      config: what config.json says, `_class_name` among it.
      dtype: floating-point type of the files.
      stem: name of the files before `.safetensors`.
      max_shard_bytes: a file holds at most as much, or one tensor that is larger.

    Raises:
      UserError: `target` exists, or cannot be written; nothing is left of it then.
      ValueError: `tensors` are not those of `shapes`.
    """
    with new_folder(target) as folder:
        _write_weights(folder, iter(tensors), shapes, np.dtype(dtype), stem, max_shard_bytes)
        _write_json(folder / "config.json", config)


def _write_weights(
    folder: Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    shapes: Shapes,
    dtype: np.dtype,
    stem: str,
    max_shard_bytes: int,
) -> None:
    """The safetensors of a folder, and their index if they are several."""
    shards = _split(shapes, dtype, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = folder / f"{stem}{part}.safetensors"
        _write_shard(file, tensors, shard, dtype)
        weight_map |= dict.fromkeys(shard, file.name)
    if next(tensors, None) is not None:
        raise ValueError(f"more tensors than the {len(shapes)} shapes")
    if len(shards) > 1:
        total = sum(_num_bytes(shape, dtype) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{stem}.safetensors.index.json", index)


def _split(shapes: Shapes, dtype: np.dtype, max_shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """`shapes` in their order, cut before a tensor that would not fit any more."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = _num_bytes(shape, dtype)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _write_shard(path: Path, tensors: Iterator[tuple[str, np.ndarray]], shapes: Shapes, dtype: np.dtype) -> None:
    """One safetensors file of the next tensors, which must be those of `shapes`."""
    with path.open("wb") as file:
        file.write(_header(shapes, dtype))
        for name, shape in shapes.items():
            found, tensor = next(tensors, ("none", np.zeros(0)))
            if (found, tensor.shape) != (name, shape):
                raise ValueError(f"tensor {found} {tensor.shape} where {name} {shape} was announced")
            file.write(tensor.astype(dtype, order="C", copy=False).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _header(shapes: Shapes, dtype: np.dtype) -> bytes:
    """The length of the header, then the header, padded so that tensors begin aligned."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + _num_bytes(shape, dtype)
        fields[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(fields, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
