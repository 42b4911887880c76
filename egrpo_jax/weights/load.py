"""Published tensors straight into arrays on the devices, one after another.

The host holds one tensor at a time, and of it only what the devices of this process need: the stacks of layers lie on
the devices from the start, and each layer is written into its place. What is stored as int8 is read whole, for its
scales, and rounded before it leaves the host.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.int8 import Int8, quantise
from egrpo_jax.weights.files import TensorFiles, shorten
from egrpo_jax.weights.layout import Layout, Leaf, Params, leaf_rows, published_shapes, split_tensor

_BIG = 2**30  # bytes from which a progress bar is shown


def load_params(files: TensorFiles, layout: Layout, abstract: Mapping[str, Any], ignore: Sequence[str] = ()) -> Params:
    """Our parameter tree from a published model, on the devices.

    Every process of a multi-host run calls it with the same arguments and reads what its own devices need.

    Args:
      files: the published tensors; floating-point ones of any width are converted.
      layout: which tensors hold our leaves, and how.
      abstract: tree of `jax.ShapeDtypeStruct`: shape and type wanted, and where: `sharding` a `NamedSharding`, or None
        for the default device; two of them in an `Int8`.
      ignore: patterns of whole names that may be in the file and hold no parameter.

    Raises:
      UserError: tensors are missing, unexpected, of another shape or not floating-point; names them all in one line. Or
        one to be stored as int8 is not finite.
    """
    _check_published(files, published_shapes(layout, abstract), ignore)
    wanted = flatten_dict(abstract, sep="/")
    _check_covered(layout, wanted)
    flat: dict[str, Any] = {}
    for leaf, view in _leaves(files, layout, abstract):
        struct = wanted[leaf.path]
        stored = _quantised(files, leaf, view) if isinstance(struct, Int8) else view
        if leaf.layer is None:
            flat[leaf.path] = jax.tree.map(lambda array, like: _put(array, like.dtype, like.sharding), stored, struct)
        else:
            stack = flat.pop(leaf.path) if leaf.path in flat else jax.tree.map(_empty_stack, struct)
            flat[leaf.path] = jax.tree.map(functools.partial(_put_layer, leaf.layer), stack, stored, struct)
        # Else transfers would queue up, each with its tensor in host memory.
        jax.block_until_ready(flat[leaf.path])
    return unflatten_dict(flat, sep="/")


def _leaves(files: TensorFiles, layout: Layout, abstract: Mapping[str, Any]) -> Iterator[tuple[Leaf, np.ndarray]]:
    """Every leaf, or layer of one, as a view of its file; shows a progress bar."""
    sizes = {name: math.prod(tensor.shape) * tensor.dtype.itemsize for name, tensor in files.stored.items()}
    total = sum(sizes[e.name] for e in layout)
    # None: shown on a terminal only.
    hidden = True if total < _BIG else None
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {files.path.name}", disable=hidden) as bar:
        for e in layout:
            yield from split_tensor(e, files[e.name], leaf_rows(e, abstract))
            bar.update(sizes[e.name])


def _quantised(files: TensorFiles, leaf: Leaf, view: np.ndarray) -> Int8:
    try:
        return quantise(view)
    except ValueError:
        raise UserError(
            f"{files.path}: a weight of {leaf.path} is not finite, which int8 cannot store; the file may be damaged"
        ) from None


def _put_layer(index: int, stack: jax.Array, view: np.ndarray, struct: jax.ShapeDtypeStruct) -> jax.Array:
    """`stack` with `view` as its layer `index`, in the same memory."""
    return _insert(stack, _put(view, struct.dtype, _layer_sharding(struct.sharding)), index, struct.sharding)


def _put(view: np.ndarray, dtype: Any, sharding: NamedSharding | None) -> jax.Array:
    """`view` on the devices, as `dtype`; only the slices that the devices of this process hold are read."""
    # astype copies even where the type is right: on the CPU an array could else go on sharing memory with the file.
    if sharding is None:
        return jax.device_put(view.astype(dtype))
    read = _once_each(lambda index: view[index].astype(dtype))
    return jax.make_array_from_callback(view.shape, sharding, read)


def _once_each(read: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """`read`, remembering what it read: devices that hold the same slice share one copy."""
    slices: dict[tuple[Any, ...], np.ndarray] = {}

    def remembered(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in slices:
            slices[key] = read(index)
        return slices[key]

    return remembered


def _layer_sharding(sharding: NamedSharding | None) -> NamedSharding | None:
    """The layout of one layer of a stack that is laid out as `sharding`."""
    return sharding if sharding is None else sharding.update(spec=PartitionSpec(*sharding.spec[1:]))


@functools.partial(jax.jit, static_argnums=0)
def _empty_stack(struct: jax.ShapeDtypeStruct) -> jax.Array:
    return _laid_out(jnp.zeros(struct.shape, struct.dtype), struct.sharding)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _insert(stack: jax.Array, layer: jax.Array, index: chex.Numeric, sharding: NamedSharding | None) -> jax.Array:
    """`stack` with `layer` at `index`, in the same memory."""
    return _laid_out(jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0), sharding)


def _laid_out(array: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)


def _check_published(files: TensorFiles, shapes: Mapping[str, tuple[int, ...]], ignore: Sequence[str]) -> None:
    """Raises UserError unless `files` holds exactly the tensors of `shapes`, apart from names to ignore."""
    stored = files.stored
    present = [name for name in shapes if name in stored]
    mistakes = {
        "missing": [name for name in shapes if name not in stored],
        "unexpected": [name for name in stored if name not in shapes and not _fits(name, ignore)],
        "of another shape": [
            f"{name} {list(stored[name].shape)} instead of {list(shapes[name])}"
            for name in present
            if stored[name].shape != shapes[name]
        ],
        "not floating-point": [
            f"{name} {stored[name].dtype}" for name in present if not jnp.issubdtype(stored[name].dtype, jnp.floating)
        ],
    }
    found = [f"{len(names)} {what} ({shorten(names)})" for what, names in mistakes.items() if names]
    if found:
        raise UserError(
            f"{files.path} does not hold the model that was asked for: of its {len(shapes)} tensors "
            f"{'; '.join(found)}; give the file of the right model, whole"
        )


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _check_covered(layout: Layout, wanted: Mapping[str, Any]) -> None:
    """Raises ValueError if a leaf, or a layer of a stack, is in no tensor of `layout`: it would be missing, or zero."""
    held: dict[str, set[int | None]] = {}
    for e in layout:
        for leaf in e.leaves:
            held.setdefault(leaf.path, set()).add(leaf.layer)
    for path, struct in wanted.items():
        layers = held.get(path, set())
        if layers != {None} and layers != set(range(struct.shape[0] if struct.shape else 0)):
            raise ValueError(f"the layout holds {sorted(layers, key=str)} of {path} {struct.shape}")
