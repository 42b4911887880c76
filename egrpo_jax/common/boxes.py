"""Boxes around parameters: whatever a parameter is made from when a layer reads it."""

from __future__ import annotations

from typing import Any, TypeVar

import chex
import flax.linen as nn

Self = TypeVar("Self", bound="Box")


class Box(nn.meta.AxisMetadata[chex.Array]):
    """A parameter that Flax makes by `unbox` when a layer reads it, and only then: of a scanned stack, layer by layer.

    What a box knows of axes is counted from the end, so that it is the same with and without a layer axis.
    """

    def replace_boxed(self, val: Any) -> Any:
        """Raises TypeError: what is in boxes is only read."""
        del val
        raise TypeError(f"a {type(self).__name__} is only read, not written")

    def add_axis(self: Self, index: int, params: dict[Any, Any]) -> Self:
        """This box: a leading axis changes nothing that is counted from the end."""
        del index, params
        return self

    def remove_axis(self: Self, index: int, params: dict[Any, Any]) -> Self:
        """This box, as `add_axis`."""
        del index, params
        return self
