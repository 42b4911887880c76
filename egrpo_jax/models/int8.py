"""Kernels stored as int8, a scale for each output channel beside them: half of bfloat16, for weights that stay as they
are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from egrpo_jax.common.boxes import Box
from egrpo_jax.common.trees import path_name

LEVELS = 127
"""Positive ones; as many are negative."""


@struct.dataclass
class Int8(Box):
    """The kernel `values * scale`; each of the two may be in a box of its own.

    Attributes:
      values: `[..., in, out]`, int8.
      scale: `[..., 1, out]`, float32.
    """

    values: chex.Array
    scale: chex.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        return self.values.shape

    def unbox(self) -> chex.Array:
        """The kernel, float32; a layer rounds it to the dtype that it computes in."""
        values, scale = nn.meta.unbox((self.values, self.scale))
        return values.astype(scale.dtype) * scale


def quantise(kernel: np.ndarray) -> Int8:
    """`kernel [..., in, out]` in host memory, rounded to multiples of `scale`, the largest of a channel / `LEVELS`.

    Raises:
      ValueError: it is not finite.
    """
    kernel = np.asarray(kernel, np.float32)
    # A channel of zeros has a scale as well, and no scale is so small that devices take it for zero.
    scale = np.maximum(np.abs(kernel).max(-2, keepdims=True) / LEVELS, np.finfo(np.float32).tiny)
    if not np.isfinite(scale).all():
        raise ValueError("a kernel that is not finite")
    values = kernel / scale
    return Int8(np.rint(values, out=values).astype(np.int8), scale)


def int8_kernels(params: Mapping[str, Any], pattern: str) -> Any:
    """`params`, as `jax.ShapeDtypeStruct`, with the kernels in whose path `pattern` is found as `Int8`."""

    def stored(path: Any, leaf: jax.ShapeDtypeStruct) -> Any:
        if not re.search(pattern, path_name(path)):
            return leaf
        *stack, _, outputs = leaf.shape
        return Int8(leaf.update(dtype=jnp.int8), jax.ShapeDtypeStruct((*stack, 1, outputs), jnp.float32))

    return jax.tree_util.tree_map_with_path(stored, params)
