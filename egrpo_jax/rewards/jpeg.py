"""Rewards by how well an image compresses, which need no network: for trying out a training run.

A score is a size in kB of 1000 bytes, as in DDPO (arXiv:2305.13301); Flow-GRPO divides its compressibility by 500.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import chex
import numpy as np
from PIL import Image

from egrpo_jax.common.images import to_uint8
from egrpo_jax.rewards.base import Reward

QUALITY = 95


def to_jpeg(image: np.ndarray) -> bytes:
    """The JPEG file of `image [H, W, 3]`, uint8."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=QUALITY)
    return file.getvalue()


def incompressibility(*_: object) -> Reward:
    """Size in kB of an image's JPEG: the larger, the better."""
    return _sizes


def compressibility(*_: object) -> Reward:
    """Minus the size in kB of an image's JPEG: the smaller, the better."""
    return lambda images, prompts: -_sizes(images, prompts)


def _sizes(images: chex.Array, prompts: Sequence[str]) -> np.ndarray:
    """kB `[B]` of `images [B, H, W, 3]` in [0, 1]; the prompts do not matter."""
    del prompts
    return np.array([len(to_jpeg(image)) / 1000 for image in to_uint8(images)], np.float32)
