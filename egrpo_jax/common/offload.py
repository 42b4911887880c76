"""Arrays that rest in the memory of their devices' hosts, and are brought to the devices where they are used."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

HOST = "pinned_host"
"""JAX's name for it."""


def on_host(tree: Any) -> Any:
    """`tree` in host memory: arrays are moved, shapes (`jax.ShapeDtypeStruct`) with shardings say so. Scalars stay."""

    def moved(leaf: Any) -> Any:
        if np.ndim(leaf) == 0:
            return leaf
        where = leaf.sharding.with_memory_kind(HOST)
        return leaf.update(sharding=where) if isinstance(leaf, jax.ShapeDtypeStruct) else jax.device_put(leaf, where)

    return jax.tree.map(moved, tree)


def rests_on_host(tree: Any) -> bool:
    """Tells if a leaf of `tree` is in host memory; inside `jax.jit`."""
    return any(jax.typeof(leaf).memory_space == jax.memory.Space.Host for leaf in jax.tree.leaves(tree))


def on_device(tree: Any) -> Any:
    """`tree` in the devices' memory, inside `jax.jit`."""
    return jax.tree.map(lambda leaf: _in(jax.memory.Space.Device, leaf), tree)


def where_it_was(tree: Any, before: Any) -> Any:
    """`tree` in the memory where `before`, a tree like it, was; inside `jax.jit`."""
    return jax.tree.map(lambda leaf, old: _in(jax.typeof(old).memory_space, leaf), tree, before)


def _in(space: Any, leaf: Any) -> Any:
    return leaf if jax.typeof(leaf).memory_space == space else jax.device_put(leaf, space)
