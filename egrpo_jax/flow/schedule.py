r"""Time grids, the noise of an SDE step, its entropy, and the merging of steps.

A rectified flow connects data x_0 and noise e by x_t = (1 - t) x_0 + t e, so t = 1 is pure noise and t = 0 is data.
A grid of T steps is a decreasing sequence of T + 1 times, from 1 to 0; **step i starts at `times[i]`**, so step 0 is
the noisiest one (the paper counts the other way: its k is T - i).

The SDE step from t over a span D = t - t' has the standard deviation sigma_t sqrt(D) with
sigma_t = a sqrt(t / (1 - t)), hence the differential entropy per latent dimension

    h / d = 1/2 log(2 pi e sigma_t^2 D).

E-GRPO (arXiv:2601.00423, section 4) merges l grid steps into one random step, l being the smallest number for which
e^{h/d} reaches a threshold tau. All functions here run on the host in float64: a schedule is static.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

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


def sigma(times: Times, step: int, noise_level: float) -> float:
    """Diffusion coefficient sigma_t = a sqrt(t / (1 - t)) of the SDE at grid step `step`.

    At t = 1 it is infinite; as in Flow-GRPO and the E-GRPO code the next time of the grid stands in for t in 1 - t.
    """
    time = times[step]
    remaining = 1 - (times[step + 1] if time == 1 else time)
    return noise_level * math.sqrt(time / remaining)


def exp_entropy(times: Times, step: int, merge: int, noise_level: float) -> float:
    """e^{h/d} = sqrt(2 pi e) sigma_t sqrt(D) of the SDE step that starts at `step` and spans `merge` grid steps."""
    if not (0 <= step < step + merge < len(times)):
        raise ValueError(f"step {step} merging {merge} leaves the grid of {len(times) - 1} steps")
    span = times[step] - times[step + merge]
    return math.sqrt(2 * math.pi * math.e * span) * sigma(times, step, noise_level)


@dataclasses.dataclass(frozen=True)
class Merge:
    """How many grid steps one random step spans; `clamped` if even the longest span stays below the threshold."""

    length: int
    clamped: bool = False


def merge_by_entropy(times: Times, step: int, noise_level: float, threshold: float) -> Merge:
    """The smallest merge whose e^{h/d} is at least `threshold` (E-GRPO's rule).

    A late step may reach the end of the grid before it reaches the threshold: then it spans all that is left, and
    says so.
    """
    longest = len(times) - 1 - step
    for length in range(1, longest + 1):
        if exp_entropy(times, step, length, noise_level) >= threshold:
            return Merge(length)
    return Merge(longest, clamped=True)


def merges_by_entropy(times: Times, steps: Sequence[int], noise_level: float, threshold: float) -> tuple[Merge, ...]:
    """`merge_by_entropy` for each of `steps`."""
    return tuple(merge_by_entropy(times, step, noise_level, threshold) for step in steps)
