"""Published checkpoints and our parameter trees, related by tables.

A *layout* lists the tensors of a published format. Each `Entry` says which leaves of our tree a tensor holds, one after
another along its first axis, and in what form; a leaf of a scanned stack of layers is spread over one tensor for each
layer. The same table reads and writes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """The forms of an array in a file and here: two functions, each the other's inverse."""

    to_ours: Callable[[np.ndarray], np.ndarray]
    to_published: Callable[[np.ndarray], np.ndarray]


def _swap_halves(array: np.ndarray) -> np.ndarray:
    first, second = np.split(array, 2)
    return np.concatenate([second, first])


def _by_channel(array: np.ndarray) -> np.ndarray:
    return array.reshape(4, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


def _by_place(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, 4, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


AS_IS = Form(lambda x: x, lambda x: x)
LINEAR = Form(lambda x: x.T, lambda x: x.T)
"""`[out, in]` in files, `[in, out]` here."""
CONV = Form(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
"""`[out, in, height, width]` in files, `[height, width, in, out]` here."""
POINT_CONV = Form(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
"""A 1x1 convolution in files, a linear layer here."""
SWAPPED = Form(_swap_halves, _swap_halves)
"""The first and the second half of the rows change places."""
LINEAR_SWAPPED = Form(lambda x: _swap_halves(x).T, lambda x: _swap_halves(x.T))

# The channels of a token are those of a 2x2 patch: here the four places (i, j) of each channel c lie side by side,
# (c, i, j); some files have the channels of each place side by side, (i, j, c).
PATCH_CONV = Form(lambda x: x.reshape(len(x), -1).T, lambda x: x.T.reshape(x.shape[1], -1, 2, 2))
"""A 2x2 convolution of stride 2, `[out, c, i, j]`, in files, a linear layer of tokens here."""
PATCH_ROWS = Form(_by_channel, _by_place)
"""A vector with an entry for each channel of a token, (i, j, c) in files."""
LINEAR_PATCH_ROWS = Form(lambda x: _by_channel(x).T, lambda x: _by_place(x.T))
"""A linear layer that makes tokens, (i, j, c) in files."""
LINEAR_PATCH_COLUMNS = Form(lambda x: _by_channel(x.T), lambda x: _by_place(x).T)
"""A linear layer that reads tokens, (i, j, c) in files."""
SQUEEZED = Form(lambda x: x[0], lambda x: x[None])
"""A first axis of 1 in files, which is not here."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of our tree: its path, joined with '/', and its index on the leading axis of a stack of layers."""

    path: str
    layer: int | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A published tensor: `leaves`, each brought into `form`, joined along the first axis."""

    name: str
    leaves: tuple[Leaf, ...]
    form: Form = AS_IS


Layout = tuple[Entry, ...]


def entry(name: str, *paths: str, form: Form = AS_IS) -> Entry:
    """The tensor `name` that holds the leaves at `paths`."""
    return Entry(name, tuple(Leaf(path) for path in paths), form)


def kernel(name: str, *paths: str) -> Layout:
    """Weight of the linear layer `name`, which has no bias, that holds our layers at `paths`, by output rows."""
    return (entry(f"{name}.weight", *(f"{path}/kernel" for path in paths), form=LINEAR),)


def linear(name: str, *paths: str) -> Layout:
    """Weight and bias of the linear layer `name` that holds our layers at `paths`, by output rows."""
    return (*kernel(name, *paths), entry(f"{name}.bias", *(f"{path}/bias" for path in paths)))


def norm(name: str, path: str) -> Layout:
    """Weight and bias of the norm `name`, ours at `path`."""
    return entry(f"{name}.weight", f"{path}/scale"), entry(f"{name}.bias", f"{path}/bias")


def for_layers(count: int, entries: Iterable[Entry], first: int = 0) -> Layout:
    """`entries` for each of `count` layers of a stack: '{}' in a name becomes the layer's number, from `first` on."""
    return tuple(
        Entry(e.name.format(first + layer), tuple(Leaf(leaf.path, layer) for leaf in e.leaves), e.form)
        for e in entries
        for layer in range(count)
    )


def published_shapes(layout: Layout, params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of `layout`, given our tree (arrays, or `jax.ShapeDtypeStruct`)."""
    flat = flatten_dict(params, sep="/")
    return {e.name: _joined_shape([_published_shape(e.form, leaf, flat) for leaf in e.leaves]) for e in layout}


def _published_shape(form: Form, leaf: Leaf, flat: Mapping[str, Any]) -> tuple[int, ...]:
    shape = flat[leaf.path].shape if leaf.layer is None else flat[leaf.path].shape[1:]
    # One byte, seen as the whole array; forms that join parts copy it, hence the smallest type.
    return form.to_published(np.broadcast_to(np.zeros((), np.bool_), shape)).shape


def _joined_shape(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]


def split_tensor(entry: Entry, tensor: np.ndarray, rows: Iterable[int]) -> Iterator[tuple[Leaf, np.ndarray]]:
    """The leaves (or layers of leaves) that `tensor` holds; `rows` are how many of its rows belong to each."""
    start = 0
    for leaf, count in zip(entry.leaves, rows, strict=True):
        part = tensor if len(entry.leaves) == 1 else tensor[start : start + count]
        yield leaf, entry.form.to_ours(part)
        start += count


def leaf_rows(entry: Entry, params: Mapping[str, Any]) -> tuple[int, ...]:
    """The number of rows of the tensor that belong to each leaf; 0 for a scalar."""
    flat = flatten_dict(params, sep="/")
    return tuple((*_published_shape(entry.form, leaf, flat), 0)[0] for leaf in entry.leaves)


def export_tensors(layout: Layout, params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Name and tensor, one after another, of all that `layout` holds of our tree."""
    flat = flatten_dict(params, sep="/")
    for e in layout:
        arrays = [flat[leaf.path] if leaf.layer is None else flat[leaf.path][leaf.layer] for leaf in e.leaves]
        parts = [e.form.to_published(np.asarray(array)) for array in arrays]
        yield e.name, parts[0] if len(parts) == 1 else np.concatenate(parts)
