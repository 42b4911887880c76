"""Rules of sharding: regular expressions on the paths of parameters, and the mesh axes that these are split over."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from egrpo_jax.common.trees import path_name

Rules = tuple[tuple[str, PartitionSpec], ...]
"""(regular expression found in a parameter's path, joined with '/'; the sharding of its **last** axes). The first rule
that fits counts; a parameter that no rule fits is replicated."""

INTO_TENSOR = PartitionSpec("fsdp", "tensor")
"""Of a kernel that reads the residual stream and writes what is split over `tensor`: heads, hidden units."""
OUT_OF_TENSOR = PartitionSpec("tensor", "fsdp")
"""Of a kernel that reads what is split over `tensor` and writes the residual stream."""


def sharding(mesh: Mesh, rules: Rules, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of the parameter at `path`: an axis is split only where the mesh axis divides it."""
    spec = next((spec for pattern, spec in rules if re.search(pattern, path)), PartitionSpec())
    leading = len(shape) - len(spec)
    if leading < 0:
        raise ValueError(f"{path} of shape {shape} has fewer axes than its rule {spec}")
    axes = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape[leading:], strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, *axes))


def shardings(mesh: Mesh, rules: Rules, tree: Any) -> Any:
    """The sharding of every leaf of `tree` (arrays, or `jax.ShapeDtypeStruct`)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding(mesh, rules, path_name(path), jax.numpy.shape(leaf)), tree
    )


def with_shardings(mesh: Mesh, rules: Rules, tree: Any) -> Any:
    """`tree` (arrays, or `jax.ShapeDtypeStruct`) as `jax.ShapeDtypeStruct`, each leaf with its sharding."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        shardings(mesh, rules, tree),
    )
