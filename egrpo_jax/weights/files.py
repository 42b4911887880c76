"""Published safetensors, looked at without being read: one file, or shards, with an index or without.

A tensor comes as a view of the file, mapped into memory: transposing it or taking a slice reads nothing, using the
slice reads that slice, and the pages are given back with the view. The library (https://huggingface.co/docs/safetensors)
reads and checks the header; tensors it would copy whole, and it has no NumPy types for 8-bit floats.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from egrpo_jax.common.errors import UserError, first_line

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
"""Names of the weights in a folder of diffusers or transformers."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""Prefixes that some community files put before every name of a transformer."""

BESIDE = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.", "conditioner.")
"""Prefixes of other models in a community file that holds a transformer too."""

LFS_POINTER = b"version https://git-lfs"
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<total>\d{5})\.safetensors")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not read yet: it begins `offset` bytes after the beginning of `file`."""

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
        """The tensors whose names begin with `prefix`, which is taken off: one model of a file that holds several."""
        stored = {name.removeprefix(prefix): tensor for name, tensor in self.stored.items() if name.startswith(prefix)}
        return TensorFiles(self.path, stored)


def open_tensors(path: str | os.PathLike[str]) -> TensorFiles:
    """The tensors at `path`: a safetensors file, an index of shards, or a folder with one of them, or with all shards.

    A prefix of `PREFIXES` that all names have is taken off; other models in the same file, those under `BESIDE`, are
    left out.

    Raises:
      UserError: nothing there, several files to choose from, a shard missing, a file damaged or of another format.
    """
    path = Path(path)
    files = TensorFiles(path, _read_folder(path) if path.is_dir() else _read_file(path))
    for prefix in PREFIXES:
        transformer = files.under(prefix)
        if transformer and all(name.startswith((prefix, *BESIDE)) for name in files):
            return transformer
    return files


def _read_folder(folder: Path) -> dict[str, StoredTensor]:
    for stem in STEMS:
        for name in (f"{stem}.safetensors.index.json", f"{stem}.safetensors"):
            if (folder / name).is_file():
                return _read_file(folder / name)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if not found:
        stems = " or ".join(f"{stem}.safetensors" for stem in STEMS)
        raise UserError(f"{folder} has no {stems}; give the folder of a published model, or a safetensors file")
    sets = {match.groups() for match in map(_SHARD.fullmatch, found) if match}
    if len(found) == 1 and not sets:
        return _read_file(folder / found[0])
    if len(sets) == 1 and all(map(_SHARD.fullmatch, found)):
        return _read_all_shards(folder, *sets.pop())
    remedy = "leave those of one model there" if sets else "name one of them"
    raise UserError(f"{folder} holds {shorten(found)}; {remedy}")


def _read_file(path: Path) -> dict[str, StoredTensor]:
    return _read_index(path) if path.suffix == ".json" else _read_header(path)


def _read_all_shards(folder: Path, stem: str, total: str) -> dict[str, StoredTensor]:
    """All tensors of a model in shards without an index."""
    shards = [f"{stem}-{number:05}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
    merged: dict[str, StoredTensor] = {}
    for shard, header in _read_shards(folder, shards, f"of which there are {int(total)}").items():
        for name in header.keys() & merged.keys():
            raise UserError(f"{folder} has {name} both in {merged[name].file.name} and in {shard}; download it again")
        merged |= header
    return merged


def _read_index(index: Path) -> dict[str, StoredTensor]:
    """All tensors that an index names, from the headers of its shards."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = sorted({os.fspath(shard) for shard in weight_map.values()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{index} is not an index of safetensors: it needs a weight_map, from names to files") from None
    headers = _read_shards(index.parent, shards, f"named in {index.name}")
    lost = [name for name, shard in weight_map.items() if name not in headers[shard]]
    if lost:
        raise UserError(f"{index} promises {shorten(lost)}, not in the files it names; download the folder again")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _read_shards(folder: Path, shards: Sequence[str], known_from: str) -> dict[str, dict[str, StoredTensor]]:
    """The header of each shard, all of which must be there."""
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise UserError(f"{folder} lacks {shorten(absent)}, {known_from}; download the folder again")
    return {shard: _read_header(folder / shard) for shard in shards}


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one file. They follow one another without gaps, which the library has checked."""
    stored: dict[str, StoredTensor] = {}
    offset = _data_start(path)
    for name, type_name, shape in _described(path):
        if type_name not in DTYPES:
            raise UserError(f"{path}: {name} is of type {type_name}; must be one of {', '.join(DTYPES)}")
        stored[name] = StoredTensor(path, DTYPES[type_name], shape, offset)
        offset += math.prod(shape) * DTYPES[type_name].itemsize
    return stored


def _data_start(path: Path) -> int:
    """The byte at which the tensors begin: after the header and, before it, its length in eight."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if start == LFS_POINTER:
        raise UserError(f"{path} is a pointer of Git LFS, not the weights; fetch them with: git lfs pull")
    return 8 + int.from_bytes(start[:8], "little")


def _described(path: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, type and shape of each tensor, in the order in which they lie in the file."""
    try:
        with safe_open(path, "numpy") as file:
            views = [(name, file.get_slice(name)) for name in file.offset_keys()]
            return [(name, view.get_dtype(), tuple(view.get_shape())) for name, view in views]
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged: {first_line(error)}; give a safetensors file, or download it again"
        ) from None


def shorten(names: list[str], most: int = 8) -> str:
    """`names` for an error message, those after the first `most` only counted."""
    listed = ", ".join(names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"
