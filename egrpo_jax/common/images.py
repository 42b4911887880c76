"""Images as numbers."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

MAGENTA = (255, 0, 255)
"""Stands for an image that is none: nobody takes it for one, as they would black."""


def to_uint8(images: ArrayLike) -> np.ndarray:
    """Floats in [0, 1], of any shape, as uint8: clipped, scaled by 255 and rounded. uint8 stays.

    Raises:
      ValueError: a value is nan or infinite, which no pixel can show.
    """
    values = np.asarray(images)
    if values.dtype == np.uint8:
        return values
    values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"expected finite pixels, found nan or infinity in images {values.shape}")
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)


def to_display(images: ArrayLike) -> np.ndarray:
    """`images [B, H, W, 3]`, uint8 or in [0, 1], as uint8 for people, who see one that is not finite in all magenta."""
    values = np.asarray(images)
    if values.dtype == np.uint8:
        return values
    finite = np.asarray(finite_images(values))
    levels = to_uint8(np.where(finite[:, None, None, None], values, 0))
    levels[~finite] = MAGENTA
    return levels


def finite_images(images: chex.Array) -> chex.Array:
    """Tells of each of `images [B, H, W, 3]` if it is without nan and infinity: bool `[B]`, from where they lie."""
    return _finite(images) if isinstance(images, jax.Array) else np.isfinite(images).all((1, 2, 3))


@jax.jit
def _finite(images: chex.Array) -> chex.Array:
    return jnp.isfinite(images).all((1, 2, 3))
