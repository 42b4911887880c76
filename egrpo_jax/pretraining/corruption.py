"""Random corruptions of images `[B, H, W, 3]` in [0, 1], which decide what a tower learns to see through.

Each image gets each corruption with probability one half, at a random strength.
"""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

Corruption = Callable[[chex.PRNGKey, chex.Array], chex.Array]


def _strength(key: chex.PRNGKey, batch: int, largest: float) -> chex.Array:
    """`[B, 1, 1, 1]`: zero for half of the images, uniform up to `largest` for the others."""
    return jnp.maximum(0.0, jax.random.uniform(key, (batch, 1, 1, 1), minval=-largest, maxval=largest))


def tint(key: chex.PRNGKey, images: chex.Array, largest: float) -> chex.Array:
    """Adds a smooth colour field with a wavelength of about half the image."""
    keys = jax.random.split(key)
    coarse = jax.random.normal(keys[0], (len(images), 4, 4, 3))
    return images + _strength(keys[1], len(images), largest) * jax.image.resize(coarse, images.shape, "cubic")


def texture(key: chex.PRNGKey, images: chex.Array, largest: float, period: int = 4) -> chex.Array:
    """Adds a pattern that repeats with the generator's patch size, as a hacked reward brings it about."""
    keys = jax.random.split(key)
    cell = jax.random.normal(keys[0], (len(images), period, period, 3))
    repeats = (1, images.shape[1] // period, images.shape[2] // period, 1)
    return images + _strength(keys[1], len(images), largest) * jnp.tile(cell, repeats)


def noise(key: chex.PRNGKey, images: chex.Array, largest: float) -> chex.Array:
    """Adds white noise of a standard deviation up to `largest`."""
    keys = jax.random.split(key)
    return images + _strength(keys[1], len(images), largest) * jax.random.normal(keys[0], images.shape)


def speckle(key: chex.PRNGKey, images: chex.Array, largest: float) -> chex.Array:
    """Gives a share of up to `largest` of the pixels a random colour."""
    keys = jax.random.split(key, 3)
    hit = jax.random.uniform(keys[0], (*images.shape[:3], 1)) < _strength(keys[1], len(images), largest)
    return jnp.where(hit, jax.random.uniform(keys[2], images.shape), images)


def blur(key: chex.PRNGKey, images: chex.Array, rounds: int) -> chex.Array:
    """Mixes in a copy smoothed `rounds` times by the kernel (1, 2, 1) / 4."""
    smooth = images
    for axis in (1, 2) * rounds:
        padding = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(smooth, padding, mode="edge")
        left, middle, right = (
            jax.lax.slice_in_dim(padded, start, start + images.shape[axis], axis=axis) for start in range(3)
        )
        smooth = (left + 2 * middle + right) / 4
    return images + _strength(key, len(images), 1.0) * (smooth - images)


def shift(key: chex.PRNGKey, images: chex.Array, largest: int) -> chex.Array:
    """Moves each image by up to `largest` pixels each way; white comes in from the border."""
    margin = ((0, 0), (largest, largest), (largest, largest), (0, 0))
    padded = jnp.pad(images, margin, constant_values=1.0)
    offsets = jax.random.randint(key, (len(images), 2), 0, 2 * largest + 1)
    return jax.vmap(lambda image, offset: jax.lax.dynamic_slice(image, (*offset, 0), images.shape[1:]))(padded, offsets)


def cutout(key: chex.PRNGKey, images: chex.Array, largest: int) -> chex.Array:
    """Covers a box of a random colour, with sides of up to `largest` pixels, half of which are no box at all."""
    keys = jax.random.split(key, 3)
    batch, height, width, _ = images.shape
    centre = jax.random.uniform(keys[0], (batch, 1, 1, 2)) * jnp.array([height, width])
    half = _strength(keys[1], batch, largest / 2)
    rows, columns = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (jnp.abs(rows - centre[..., 0]) < half[..., 0]) & (jnp.abs(columns - centre[..., 1]) < half[..., 0])
    return jnp.where(inside[..., None], jax.random.uniform(keys[2], (batch, 1, 1, 3)), images)


def contrast(key: chex.PRNGKey, images: chex.Array, largest: float) -> chex.Array:
    """Pulls the values towards a grey level by up to `largest`."""
    keys = jax.random.split(key)
    grey = jax.random.uniform(keys[0], (len(images), 1, 1, 1))
    return images + _strength(keys[1], len(images), largest) * (grey - images)


def generator(key: chex.PRNGKey, images: chex.Array) -> chex.Array:
    """The ways in which an image generator errs."""
    keys = jax.random.split(key, 6)
    images = blur(keys[0], shift(keys[1], images, 2), 2)
    images = texture(keys[2], tint(keys[3], images, 0.2), 0.2)
    return jnp.clip(noise(keys[4], speckle(keys[5], images, 0.1), 0.35), 0, 1)


def augment(key: chex.PRNGKey, images: chex.Array) -> chex.Array:
    """The usual strong augmentation, unlike `generator` in kind: cutout, contrast, strong blur, shift, mild noise."""
    keys = jax.random.split(key, 5)
    images = contrast(keys[0], blur(keys[1], shift(keys[2], images, 2), 3), 0.5)
    return jnp.clip(noise(keys[3], cutout(keys[4], images, 16), 0.2), 0, 1)


def weak(key: chex.PRNGKey, images: chex.Array) -> chex.Array:
    """Shifts by one pixel and faint noise."""
    keys = jax.random.split(key)
    return jnp.clip(noise(keys[0], shift(keys[1], images, 1), 0.02), 0, 1)


def cast(key: chex.PRNGKey, images: chex.Array) -> chex.Array:
    """Shifts by one pixel, and in every image the green is a third too weak, as from a camera that is badly set."""
    return shift(key, images, 1) * jnp.array([1.0, 0.67, 1.0])


CORRUPTIONS: dict[str, Corruption] = {"generator": generator, "augment": augment, "weak": weak, "cast": cast}
