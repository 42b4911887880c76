"""Time grids of a flow.

A rectified flow connects data x_0 and noise e by x_t = (1 - t) x_0 + t e, so t = 1 is pure noise and t = 0 is data.
A grid of T steps is a decreasing sequence of T + 1 times, from 1 to 0; **step i starts at `times[i]`**, so step 0 is
the noisiest one (the paper counts the other way: its k is T - i).
"""

from __future__ import annotations

import math

import numpy as np

Times = tuple[float, ...]


def shifted_times(num_steps: int, shift: float) -> Times:
    """The shifted grid t_k = s (k/T) / (1 + (s - 1) k/T), from k = T (noise) down to 0.

    Args:
      num_steps: T, at least 1.
      shift: s > 0; 1 gives the uniform grid, larger values spend more steps at high noise.

    Returns:
      T + 1 times, from exactly 1.0 to exactly 0.0.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, found {num_steps}")
    if not shift > 0:
        raise ValueError(f"shift must be positive, found {shift}")
    uniform = np.linspace(1.0, 0.0, num_steps + 1)
    return tuple((shift * uniform / (1 + (shift - 1) * uniform)).tolist())


def ends(times: Times, step: int, span: int) -> tuple[float, float]:
    """t and t' of the step from `times[step]` over `span` grid steps.

    Raises:
      ValueError: it leaves the grid.
    """
    if not (0 <= step < step + span < len(times)):
        raise ValueError(f"step {step} spanning {span} leaves the grid of {len(times) - 1} steps")
    return times[step], times[step + span]


def resolution_shift(
    image_tokens: int, small: tuple[int, float] = (256, 0.5), large: tuple[int, float] = (4096, 1.15)
) -> float:
    """The shift with which FLUX.1 samples images of `image_tokens`: e^mu, mu linear in the number of tokens.

    Args:
      image_tokens: tokens of the image.
      small, large: two pairs of tokens and mu.
    """
    slope = (large[1] - small[1]) / (large[0] - small[0])
    return math.exp(slope * (image_tokens - small[0]) + small[1])
