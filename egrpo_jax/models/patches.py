"""Images as tokens of pixels: the latent space of a flow model that needs no autoencoder."""

from __future__ import annotations

import chex
import jax.numpy as jnp


def patchify(images: chex.Array, patch: int) -> chex.Array:
    """Cuts `images [B, height, width, C]` into tokens `[B, N, D]`, row-major, with D = patch * patch * C.

    Raises:
      ValueError: `patch` does not divide height or width.
    """
    batch, height, width, channels = images.shape
    if height % patch or width % patch:
        raise ValueError(f"patch {patch} must divide the image size {height}x{width}")
    cells = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch * patch * channels)


def unpatchify(tokens: chex.Array, grid: tuple[int, int], patch: int) -> chex.Array:
    """Inverts `patchify`: tokens `[B, N, D]` on a `grid` of (rows, columns) to images `[B, height, width, C]`."""
    chex.assert_shape(tokens, (None, grid[0] * grid[1], None))
    cells = tokens.reshape(tokens.shape[0], *grid, patch, patch, -1)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(tokens.shape[0], grid[0] * patch, grid[1] * patch, -1)


def pixels_to_latents(images: chex.Array, patch: int) -> chex.Array:
    """Images `[B, height, width, C]` in [0, 1] to latents `[B, N, D]` in [-1, 1]."""
    return patchify(images * 2 - 1, patch)


def latents_to_pixels(latents: chex.Array, grid: tuple[int, int], patch: int) -> chex.Array:
    """Latents `[B, N, D]` to images `[B, height, width, C]`, clipped to [0, 1]."""
    return jnp.clip(unpatchify(latents, grid, patch) / 2 + 0.5, 0, 1)
