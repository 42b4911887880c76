"""Checkpoints as `torch.save` lays them out, written without PyTorch."""

import math
import struct
import zipfile

import numpy as np

from egrpo_jax.weights.files import DTYPES
from egrpo_jax.weights.pickles import STORAGES

ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_STORAGE_OF = {DTYPES[name]: storage for storage, name in STORAGES.items()}


def write_checkpoint(path, tensors, key=None, root="archive", **others):
    """`{name: array}` as a state dict, by itself or under `key`, beside it the numbers `others`."""
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in tensors.items()}
    entries = {name: tensor_opcodes(str(number), array) for number, (name, array) in enumerate(arrays.items())}
    if key is not None:
        entries = {key: dict_opcodes(entries)}
    entries |= {name: integer(value) for name, value in others.items()}
    write_archive(path, dict_opcodes(entries), [array.tobytes() for array in arrays.values()], root)


def write_archive(path, opcodes, storages=(), root="archive", byteorder="little", compression=zipfile.ZIP_STORED):
    """The zip archive around the pickle of `opcodes`, its first and last left out."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", b"\x80\x02" + opcodes + b".")
        archive.writestr(f"{root}/byteorder", byteorder)
        for number, content in enumerate(storages):
            archive.writestr(f"{root}/data/{number}", content)
        archive.writestr(f"{root}/version", "3\n")


def dict_opcodes(entries):
    """An ordered dict of names to what opcodes leave on the stack."""
    return ORDERED_DICT + b"(" + b"".join(text(name) + value for name, value in entries.items()) + b"u"


def tensor_opcodes(record, array, offset=0, strides=None):
    """A tensor of `array`'s type and shape in the storage `record`; strides in elements."""
    if strides is None:
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    storage = b"(%s%s%s%s%stQ" % (
        text("storage"), b"ctorch\n%s\n" % _STORAGE_OF[array.dtype].encode(), text(record), text("cpu"),
        integer(array.size),
    )  # fmt: skip
    numbers = integer(offset) + integers(array.shape) + integers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"\x89" + ORDERED_DICT + b"tR"


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value):
    return b"J" + struct.pack("<i", value)


def integers(values):
    return b"(" + b"".join(integer(value) for value in values) + b"t"
