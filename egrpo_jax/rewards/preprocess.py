"""Preparation of images for a network that scores them: resizing, cropping, normalising, on the device.

Published scorers read images from files, and each resizes in its own way; a score depends on it. Images are therefore
rounded to the 256 levels of a file first, so that the score of an image is that of the file it is saved to.

Both ways of resizing apply Keys' cubic filter (a = -1/2), widened by the factor of reduction, to rows and then to
columns: a matrix for each, made in float64 when the function is traced. They differ in what is between. Pillow stores
each result in bytes, and its integer arithmetic is repeated here to the last bit; PyTorch's `interpolate` (bicubic,
antialiased) rounds nothing. That rows come first is how Pillow was when scorers were published, up to version 12;
Pillow 13 begins with the columns of images that are more than twice as tall as wide.

No library does this: `jax.image.resize` rounds nothing, and Pillow would take every image to the host, one by one.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.images import finite_images

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

_FRACTION_BITS = 22  # of the weights in Pillow's 8-bit arithmetic
_LOW_BITS = 11


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """From images of any size to a network's input, `[B, H, W, 3]` in [0, 1] to `[B, size, size, 3]`, normalised.

    Attributes:
      size: side of the square that the network sees, in pixels.
      arithmetic: "pillow": bytes between the steps, as for an image that Pillow resized; "torch": floats.
      fit: "crop": the shorter side is resized to `size`, the longer one in proportion, and the middle taken; "squash":
        both sides are resized to `size`.
      odd_crop: where the middle lies if it cannot be in the middle: "round": half a pixel rounded to even, as
        torchvision does; "floor": up and to the left, as transformers does.
      mean, std: of each channel.
    """

    size: int = 224
    arithmetic: Literal["pillow", "torch"] = "pillow"
    fit: Literal["crop", "squash"] = "crop"
    odd_crop: Literal["round", "floor"] = "round"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __call__(self, images: chex.Array) -> chex.Array:
        """The network's input, float32; all nan for an image that is not finite."""
        chex.assert_shape(images, (None, None, None, 3))
        height, width = images.shape[1:3]
        levels = jnp.round(jnp.clip(images.astype(jnp.float32), 0, 1) * 255)
        apply = _in_integers if self.arithmetic == "pillow" else _along
        levels = apply(self._matrix(width, height), levels, axis=2)
        levels = apply(self._matrix(height, width), levels, axis=1)
        pixels = (levels / 255 - jnp.array(self.mean)) / jnp.array(self.std)
        return jnp.where(finite_images(images)[:, None, None, None], pixels, jnp.nan)

    def _matrix(self, length: int, other: int) -> np.ndarray:
        """Weights `[size, length]` that make pixels along an axis of `length`, the other one being `other` long."""
        resized = self.size if self.fit == "squash" else int(self.size * length / min(length, other))
        start = (resized - self.size) // 2 if self.odd_crop == "floor" else round((resized - self.size) / 2)
        return resize_matrix(length, resized)[start : start + self.size]


def resize_matrix(before: int, after: int) -> np.ndarray:
    """Weights `[after, before]`, float64, that resize an axis of `before` pixels to `after`; rows add to 1."""
    scale = before / after
    width = max(scale, 1.0)
    centers = (np.arange(after)[:, None] + 0.5) * scale
    pixels = np.arange(before)[None]
    weights = _keys_cubic((pixels + 0.5 - centers) / width)
    first, last = (np.floor(centers + sign * 2 * width + 0.5) for sign in (-1, 1))
    weights = np.where((pixels >= first) & (pixels < last), weights, 0)
    return weights / weights.sum(1, keepdims=True)


def _keys_cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _in_integers(matrix: np.ndarray, levels: chex.Array, axis: int) -> chex.Array:
    """As Pillow: weights of 22 bits, sums of 32, then levels of 8.

    Each weight is cut in two, so that no sum needs more than the 24 bits of float32, in which devices multiply
    matrices; that holds for a reduction by up to 16.
    """
    weights = np.trunc(matrix * 2**_FRACTION_BITS + np.copysign(0.5, matrix)).astype(np.int64)
    high = (weights + 2 ** (_LOW_BITS - 1)) >> _LOW_BITS
    low = weights - (high << _LOW_BITS)
    high_sum, low_sum = jnp.split(_along(np.concatenate([high, low]), levels, axis).astype(jnp.int32), 2, axis)
    rounded = ((high_sum << _LOW_BITS) + low_sum + 2 ** (_FRACTION_BITS - 1)) >> _FRACTION_BITS
    return jnp.clip(rounded, 0, 255).astype(jnp.float32)


def _along(matrix: np.ndarray, levels: chex.Array, axis: int) -> chex.Array:
    """The matrix product along an axis of `levels [B, H, W, C]`, in full precision."""
    product = jnp.tensordot(
        jnp.asarray(matrix, jnp.float32), levels, axes=(1, axis), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.moveaxis(product, 0, axis)
