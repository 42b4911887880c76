"""Checkpoints of PyTorch, looked at without PyTorch and without running what is in them.

`torch.save` writes a zip archive, not compressed: `<root>/data.pkl`, a pickle of the state dict in which a tensor names
its storage, shape and strides, and `<root>/data/<number>`, the bytes of each storage. A pickle is a program that may
call anything; this one may name the few things of which a state dict is made, and they are stand-ins that only note
what they are given. Tensors come as views of the file, as those of safetensors do. PyTorch's own reader that refuses
code (`weights_only`) would make PyTorch a dependency.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from egrpo_jax.common.errors import UserError
from egrpo_jax.weights.files import DTYPES, LFS_POINTER, StoredTensor, TensorFiles, shorten

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
"""PyTorch's names of the types of storages, to those of `files.DTYPES`."""

_ZIP_MAGIC, _LOCAL_HEADER = b"PK\x03\x04", struct.Struct("<4s22xHH")
_OLD_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


class _Storage(NamedTuple):
    """Numbers of one type in the record `data/<record>`."""

    record: str
    dtype: str


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RebuildTensor:
    """Stands for `torch._utils._rebuild_tensor_v2`."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        whole = all(isinstance(number, int) and number >= 0 for number in (offset, *shape, *strides))
        if not isinstance(storage, _Storage) or not whole or len(shape) != len(strides):
            raise pickle.UnpicklingError(f"no tensor: {storage}, {offset}, {shape}, {strides}")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))


class _RebuildParameter:
    """Stands for `torch._utils._rebuild_parameter`."""

    __slots__ = ()

    def __call__(self, tensor: Any, *_: Any) -> _Tensor:
        if not isinstance(tensor, _Tensor):
            raise pickle.UnpicklingError(f"no parameter: {tensor}")
        return tensor


_ALLOWED = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    **{("torch", name): name for name in STORAGES},
}
"""All that a pickle may name, all of it immutable, for a pickle can also set attributes (BUILD)."""


class _Unpickler(pickle.Unpickler):
    """Builds a state dict of `_Tensor`s; whatever the pickle names that is not in `_ALLOWED` is refused."""

    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(content))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Raises UserError for what a state dict does not need."""
        if (module, name) not in _ALLOWED:
            raise UserError(
                f"{self._path} wants to load {module}.{name}, which could run code, and is refused; give a file that "
                "holds tensors alone: a published state dict, or safetensors"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, record, _, _ = pid  # then device and number of elements
        if kind != "storage" or dtype not in STORAGES or not isinstance(record, str):
            raise pickle.UnpicklingError(f"no storage: {pid}")
        return _Storage(record, STORAGES[dtype])


def open_pickle(path: str | os.PathLike[str], key: str | None = None) -> TensorFiles:
    """The tensors of a checkpoint that `torch.save` wrote: of a state dict, or of the one that it has under `key`.

    Entries that are no tensors, such as the number of an epoch, are left out. Nothing in the file is run.

    Raises:
      UserError: the pickle names anything but tensors, there are none, the file is damaged or of another format.
    """
    path = Path(path)
    records = _records(path)
    root = _root(path, records)
    with path.open("rb") as file:
        if f"{root}/byteorder" in records and _read(path, records, file, f"{root}/byteorder") != b"little":
            raise UserError(f"{path} is big-endian; load and save it on a machine that is little-endian")
        state = _unpickle(path, _read(path, records, file, f"{root}/data.pkl"))
        tensors = _tensors(path, state, key)
        stored = {
            name: _stored(path, name, tensor, *_span(path, records, file, f"{root}/data/{tensor.storage.record}"))
            for name, tensor in tensors.items()
        }
    return TensorFiles(path, stored)


def archive_root(path: str | os.PathLike[str]) -> str:
    """The folder inside the archive: the stem of the file's name when it was saved, or "archive".

    Raises:
      UserError: the file is damaged or of another format.
    """
    path = Path(path)
    return _root(path, _records(path))


def _records(path: Path) -> Mapping[str, zipfile.ZipInfo]:
    """The archive's table of contents."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
        with zipfile.ZipFile(path) as archive:
            return {record.filename: record for record in archive.infolist()}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        raise UserError(_another_format(path, start)) from None


def _another_format(path: Path, start: bytes) -> str:
    if start == LFS_POINTER:
        return f"{path} is a pointer of Git LFS, not the weights; fetch them with: git lfs pull"
    if start.startswith(_ZIP_MAGIC):
        return f"{path} is cut off, or damaged: a zip archive without its table of contents; download it again"
    if start.startswith(_OLD_MAGIC):
        return f"{path} is of the format before PyTorch 1.6; load it with weights_only=True and save it again"
    return f"{path} is no checkpoint of PyTorch; give one that torch.save wrote, or safetensors"


def _root(path: Path, records: Mapping[str, zipfile.ZipInfo]) -> str:
    roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UserError(f"{path} is a zip archive, but no checkpoint of PyTorch: it has {len(roots)} data.pkl, not 1")
    return roots[0]


def _read(path: Path, records: Mapping[str, zipfile.ZipInfo], file: BinaryIO, name: str) -> bytes:
    begin, end = _span(path, records, file, name)
    file.seek(begin)
    return file.read(end - begin)


def _span(path: Path, records: Mapping[str, zipfile.ZipInfo], file: BinaryIO, name: str) -> tuple[int, int]:
    """The bytes of the file, from and to, at which the record `name` lies."""
    if name not in records:
        raise UserError(f"{path} is damaged: it lacks {name}; download it again")
    record = records[name]
    if record.compress_type != zipfile.ZIP_STORED:
        raise UserError(f"{path} has {name} compressed; give the file as torch.save writes it")
    file.seek(max(record.header_offset, 0))
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP_MAGIC):
        raise UserError(f"{path} is damaged: {name} is not where its table of contents says; download it again")
    _, name_size, extra_size = _LOCAL_HEADER.unpack(header)
    begin = record.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    return begin, min(begin + record.file_size, os.fstat(file.fileno()).st_size)


def _unpickle(path: Path, content: bytes) -> Any:
    try:
        return _Unpickler(content, path).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is damaged: its data.pkl is no state dict ({reason}); download it again") from None


def _tensors(path: Path, state: Any, key: str | None) -> Mapping[str, _Tensor]:
    """The tensors by name in `state`, or in the dict that it has under `key`."""
    if key is not None:
        entries = _entries(state)
        if key not in entries:
            raise UserError(f"{path} has no {key!r}, but {_listed(entries)}; is it another model's file?")
        state = entries[key]
    entries = _entries(state)
    tensors = {name: value for name, value in entries.items() if isinstance(value, _Tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        where = f"{path} under {key!r}" if key is not None else f"{path}"
        raise UserError(f"{where} has no tensors by name, but {_listed(entries)}; is it another model's file?")
    return tensors


def _entries(state: Any) -> dict[Any, Any]:
    # Not `state.items()`: the pickle may have given this dict attributes of its own.
    return dict(dict.items(state)) if isinstance(state, dict) else {}


def _listed(entries: Mapping[Any, Any]) -> str:
    return shorten([str(name) for name in entries]) or "nothing"


def _stored(path: Path, name: str, tensor: _Tensor, begin: int, end: int) -> StoredTensor:
    """`tensor` as a view of its record, the bytes `begin` to `end` of the file."""
    dtype = DTYPES[tensor.storage.dtype]
    offset = begin + tensor.offset * dtype.itemsize
    if offset + math.prod(tensor.shape) * dtype.itemsize > end:
        raise UserError(f"{path} is damaged: {name} {list(tensor.shape)} is larger than its data; download it again")
    if not _contiguous(tensor):
        raise UserError(
            f"{path}: {name} {list(tensor.shape)} is stored with strides {list(tensor.strides)}; "
            "save the state dict with every tensor contiguous"
        )
    return StoredTensor(path, dtype, tensor.shape, offset)


def _contiguous(tensor: _Tensor) -> bool:
    """True if elements follow one another row by row; the stride of an axis of length 1 does not matter."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
