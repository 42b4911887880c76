"""Parameters that lie split over `fsdp`, inside shard_map: gathered where they are read, gradients scattered back."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from egrpo_jax.common.boxes import Box
from egrpo_jax.parallel.mesh import FSDP, SAMPLES


@struct.dataclass
class Split(Box):
    """A parameter of which each device along `fsdp` holds a part.

    So a stack of blocks that is scanned gathers the weights of one layer at a time, and again in a backward pass that
    computes the block anew.

    Attributes:
      value: this device's part.
      axis: that is split: -1, -2.
      dtype: what the whole is gathered in.
    """

    value: chex.Array
    axis: int = struct.field(pytree_node=False)
    dtype: Any = struct.field(pytree_node=False)

    def unbox(self) -> chex.Array:
        """The whole parameter."""
        return _gather(self.value, self.axis, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(part: chex.Array, axis: int, dtype: Any) -> chex.Array:
    return jax.lax.all_gather(part.astype(dtype), FSDP, axis=part.ndim + axis, tiled=True)


def _gather_forward(part: chex.Array, axis: int, dtype: Any) -> tuple[chex.Array, chex.Array]:
    return _gather(part, axis, dtype), jnp.zeros((), part.dtype)


def _gather_backward(axis: int, dtype: Any, like: chex.Array, gradient: chex.Array) -> tuple[chex.Array]:
    del dtype
    whole = gradient.astype(jnp.float32)  # a sum of bfloat16 would lose more with every device
    part = jax.lax.psum_scatter(whole, FSDP, scatter_dimension=whole.ndim + axis, tiled=True)
    return (part.astype(like.dtype),)


_gather.defvjp(_gather_forward, _gather_backward)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The split of a tree of parameters over `fsdp`, as seen inside shard_map, which is manual over `SAMPLES`.

    Attributes:
      specs: like the tree; where each leaf is split over `fsdp`.
      dtype: what split leaves are gathered in; None: as they are stored, as integers always are.
    """

    specs: Any
    dtype: Any = None

    @classmethod
    def of(cls, abstract: Any, dtype: Any = None) -> Layout:
        """The layout of a tree of arrays, or of `jax.ShapeDtypeStruct` with shardings."""
        return cls(jax.tree.map(_split_over_fsdp, abstract), dtype)

    def working_copy(self, params: Any) -> Any:
        """`params` with split leaves in the dtype that they are gathered in: cast once, where many passes follow."""
        cast = lambda leaf, axis: leaf if axis is None else leaf.astype(self._gathered(leaf))
        return jax.tree.map(lambda leaf, spec: cast(leaf, _axis(spec)), params, self.specs)

    def boxed(self, params: Any) -> Any:
        """This device's parts `params`, each in a box that gathers the whole when it is read."""
        box = lambda leaf, axis: leaf if axis is None else Split(leaf, axis, self._gathered(leaf))
        return jax.tree.map(lambda leaf, spec: box(leaf, _axis(spec)), params, self.specs)

    def sum_gradients(self, grads: Any) -> Any:
        """The sum over all devices of gradients by this device's samples, each leaf lying as its parameter does."""
        # XLA refuses a sum over axes of one device beside an automatic axis.
        several = [axis for axis in SAMPLES if jax.lax.axis_size(axis) > 1]

        def summed(grad: chex.Array, spec: PartitionSpec) -> chex.Array:
            # The gather's own backward pass has summed a split leaf along `fsdp` already.
            axes = [axis for axis in several if _axis(spec) is None or axis != FSDP]
            return jax.lax.psum(grad, axes) if axes else grad

        return jax.tree.map(summed, grads, self.specs)

    def _gathered(self, leaf: chex.Array) -> Any:
        """The dtype that a split leaf is gathered in."""
        return self.dtype if self.dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype


def _split_over_fsdp(leaf: Any) -> PartitionSpec:
    """Where a leaf is split over `fsdp`: one entry for each of its axes."""
    where = getattr(leaf, "sharding", None)  # which NumPy's arrays have not
    if not isinstance(where, NamedSharding) or where.mesh.shape.get(FSDP, 1) == 1:
        return PartitionSpec(*(None,) * np.ndim(leaf))
    axes = [FSDP if axis == FSDP else None for axis in where.spec]
    return PartitionSpec(*axes, *(None,) * (np.ndim(leaf) - len(axes)))


def _axis(spec: PartitionSpec) -> int | None:
    """The axis that is split, counted from the end; None if none is."""
    return next((index - len(spec) for index, axis in enumerate(spec) if axis == FSDP), None)
