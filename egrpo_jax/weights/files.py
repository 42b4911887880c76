"""Published safetensors, looked at without being read: one file, or the shards that an index names.

A tensor comes as a view of the file, mapped into memory: transposing it or taking a slice reads nothing, using the
slice reads that slice, and the pages are given back with the view. The format is eight bytes with the length of a JSON
header, the header, which gives type, shape and place of every tensor, and the tensors:
https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.errors import UserError

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Types by their names in safetensors."""

STEMS = ("diffusion_pytorch_model", "model")
"""How diffusers and transformers call the weights in a folder."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What some community files put before every name."""

_MAX_HEADER = 100_000_000  # bytes; a limit of the format
LFS_POINTER = b"version https://git-lfs"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` in bytes from the beginning of `file`."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of a published model by name; `files[name]` is a read-only view of the file.

    Attributes:
      path: the file or folder that the user named.
      stored: where each tensor lies, of which type and shape.
    """

    def __init__(self, path: Path, stored: Mapping[str, StoredTensor]) -> None:
        self.path = path
        self.stored = stored

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self.stored[name]
        return np.asarray(np.memmap(tensor.file, tensor.dtype, "r", tensor.offset, tensor.shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def under(self, prefix: str) -> TensorFiles:
        """Those tensors whose names begin with `prefix`, which is taken off: one model of a file that holds several."""
        stored = {name.removeprefix(prefix): tensor for name, tensor in self.stored.items() if name.startswith(prefix)}
        return TensorFiles(self.path, stored)


def open_tensors(path: str | os.PathLike[str]) -> TensorFiles:
    """The tensors at `path`: a safetensors file, an index of shards, or a folder with one of them.

    A prefix of `PREFIXES` that all names have is taken off.

    Raises:
      UserError: nothing there, several files to choose from, a shard missing, a file damaged or of another format.
    """
    path = Path(path)
    file = _weights_in(path) if path.is_dir() else path
    files = TensorFiles(path, _read_index(file) if file.suffix == ".json" else _read_header(file))
    for prefix in PREFIXES:
        if files and all(name.startswith(prefix) for name in files):
            return files.under(prefix)
    return files


def _weights_in(folder: Path) -> Path:
    for stem in STEMS:
        for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
            if (folder / name).is_file():
                return folder / name
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return folder / found[0]
    if found:
        raise UserError(f"{folder} holds {shorten(found)}; name one of them")
    stems = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    raise UserError(f"{folder} has no {stems}; give the folder of a published model, or a safetensors file")


def _read_index(index: Path) -> dict[str, StoredTensor]:
    """All tensors that an index names, from the headers of its shards."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{index} is not an index of safetensors: it needs a weight_map, from names to files") from None
    absent = [shard for shard in shards if not (index.parent / shard).is_file()]
    if absent:
        raise UserError(f"{index.parent} lacks {shorten(absent)}, named in {index.name}; download the folder again")
    headers = {shard: _read_header(index.parent / shard) for shard in shards}
    lost = [name for name, shard in weight_map.items() if name not in headers[shard]]
    if lost:
        raise UserError(f"{index} promises {shorten(lost)}, not in the files it names; download the folder again")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Where each tensor of one file lies, checked against the size of the file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
            header_size = int.from_bytes(start[:8], "little")
            file.seek(8)
            header = file.read(header_size) if header_size <= _MAX_HEADER else b""
        file_size = path.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if start == LFS_POINTER:
        raise UserError(f"{path} is a pointer of Git LFS, not the weights; fetch them with: git lfs pull")
    if header and len(header) < header_size:
        raise UserError(f"{path} is cut off: {file_size} bytes, too few for its header; download it again")
    try:
        tensors: dict[str, Any] = json.loads(header)
        tensors.pop("__metadata__", None)
        stored = {name: _stored(path, name, fields, 8 + header_size) for name, fields in tensors.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is not a safetensors file, or damaged; give one, or download it again") from None
    promised = max((t.offset + math.prod(t.shape) * t.dtype.itemsize for t in stored.values()), default=8 + header_size)
    if promised != file_size:
        raise UserError(
            f"{path} is damaged: its header promises {promised} bytes, it has {file_size}; download it again"
        )
    return stored


def _stored(path: Path, name: str, fields: Mapping[str, Any], data_start: int) -> StoredTensor:
    """Raises ValueError, TypeError or KeyError for what no safetensors header says."""
    if fields["dtype"] not in DTYPES:
        raise UserError(f"{path}: {name} is of type {fields['dtype']}; must be one of {', '.join(DTYPES)}")
    dtype, shape = DTYPES[fields["dtype"]], tuple(int(size) for size in fields["shape"])
    begin, end = fields["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{shape} of {dtype} in {end - begin} bytes")
    return StoredTensor(path, dtype, shape, data_start + begin)


def shorten(names: list[str], most: int = 8) -> str:
    """`names` for an error message, those after the first `most` only counted."""
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
