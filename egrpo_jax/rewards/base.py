"""Rewards as they are written, and the scores that they give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import chex
import numpy as np
from numpy.typing import ArrayLike

T = TypeVar("T")

LARGEST = 1e15
"""Beyond it a score is none: float32 must hold the squares of weighted ones, of which a group's spread is made."""

Reward = Callable[[chex.Array, Sequence[str]], Any]
"""`(images[B, H, W, 3] in [0, 1], prompts) -> B numbers`, higher is better, always the same for the same; where no
score came nan, infinity, a number beyond `LARGEST` or, in a list, None. It is called with finite images alone. It may
have

- `start`, with these arguments, which scores in the background: see `start`;
- `require(prompts, (height, width))`, which raises UserError for prompts or a size that it cannot score;
- `encode_images(images) -> [B, D]`, vectors of length 1, by which images are compared."""

Pending = Callable[[], T]
"""Waits for the scores of images handed in before."""


class Scores(NamedTuple):
    """Scores of B images, and which of them came.

    Attributes:
      values: `[B]`, float32 and finite; 0 where none came.
      came: `[B]`, bool.
    """

    values: np.ndarray
    came: np.ndarray

    @classmethod
    def of(cls, numbers: ArrayLike) -> Scores:
        """Scores from `numbers [B]`; one that is nan or beyond plus and minus `LARGEST` did not come."""
        with np.errstate(over="ignore"):
            values = np.asarray(numbers).astype(np.float32)
        came = np.abs(values) <= LARGEST
        return cls(np.where(came, values, 0), came)

    @classmethod
    def join(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of several batches of images, one after another."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))

    def with_nan(self) -> np.ndarray:
        """The values `[B]`, nan where none came."""
        return np.where(self.came, self.values, np.float32(math.nan))

    def mean(self) -> float:
        """The mean of the scores that came; nan if none did."""
        return float(self.values[self.came].mean()) if self.came.any() else math.nan


def start(reward: Reward, images: chex.Array, prompts: Sequence[str]) -> Pending[Any]:
    """Hands `images` in for scoring; a reward on another machine scores them while this one goes on."""
    in_background = getattr(reward, "start", None)
    if in_background is not None:
        return in_background(images, prompts)
    scores = reward(images, prompts)
    return lambda: scores
