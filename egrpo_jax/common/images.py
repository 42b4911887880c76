"""Images as numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def to_uint8(images: ArrayLike) -> np.ndarray:
    """Floats in [0, 1], of any shape, as uint8: clipped, scaled by 255 and rounded; nan becomes 0. uint8 stays."""
    values = np.asarray(images)
    if values.dtype == np.uint8:
        return values
    return np.rint(np.clip(np.nan_to_num(values.astype(np.float32)), 0, 1) * 255).astype(np.uint8)
