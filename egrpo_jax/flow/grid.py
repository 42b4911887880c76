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
    return tuple(shift_times(np.linspace(1.0, 0.0, num_steps + 1), shift).tolist())


def respaced_times(times: Times, start: int, num_steps: int) -> Times:
    """`num_steps` + 1 times from `times[start]` to 0, evenly spaced in u = k/T as those of the shifted grid `times`.

    Raises:
      ValueError: `times` is no grid of `shifted_times`, and its own are not enough.
    """
    if num_steps == steps_left(times, start):
        return times[start:]
    uniform = np.linspace(1.0, 0.0, len(times))
    inner, time = uniform[1:-1], np.array(times[1:-1])
    shifts = time * (1 - inner) / (inner * (1 - time))
    if not np.allclose(shifts, shifts[:1]):
        raise ValueError(f"expected a shifted grid, found the times {times}")
    shift = shifts[0] if len(shifts) else 1.0  # the grid (1, 0) has any shift
    return (times[start], *shift_times(np.linspace(uniform[start], 0.0, num_steps + 1), shift)[1:].tolist())


def steps_left(times: Times, start: int) -> int:
    """The grid steps from `times[start]` to the end. Raises ValueError if there is no such time."""
    if not 0 <= start < len(times):
        raise ValueError(f"expected a start from 0 to {len(times) - 1} on the grid, found {start}")
    return len(times) - 1 - start


def ends(times: Times, step: int, span: int) -> tuple[float, float]:
    """t and t' of the step from `times[step]` over `span` grid steps.

    Raises:
      ValueError: it leaves the grid.
    """
    if not (0 <= step < step + span < len(times)):
        raise ValueError(f"step {step} spanning {span} leaves the grid of {len(times) - 1} steps")
    return times[step], times[step + span]


def shift_times(uniform: np.ndarray, shift: float) -> np.ndarray:
    """`uniform` times u, shifted: s u / (1 + (s - 1) u)."""
    return shift * uniform / (1 + (shift - 1) * uniform)


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


def empirical_shift(image_tokens: int, num_steps: int) -> float:
    """The shift with which FLUX.2 samples images of `image_tokens` in `num_steps`: e^mu, mu linear in the number of
    steps and, at 10 and at 200 of them, in that of tokens; above 4300 tokens as at 200 steps.

    The numbers are those of `compute_empirical_mu` in diffusers.
    """
    mu_10 = 8.73809524e-05 * image_tokens + 1.89833333
    mu_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return math.exp(mu_200)
    return math.exp(mu_200 + (mu_200 - mu_10) / 190 * (num_steps - 200))
