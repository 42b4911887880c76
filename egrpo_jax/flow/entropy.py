r"""The noise of an SDE step, its entropy, and the merging of steps.

The SDE step from t over a span dt = t - t' has the standard deviation sigma_t sqrt(dt) with
sigma_t = a sqrt(t / (1 - t)), hence the differential entropy per latent dimension

    h / d = 1/2 log(2 pi e sigma_t^2 dt).

E-GRPO (arXiv:2601.00423, section 4) merges l grid steps into one random step, l being the smallest number for which
e^{h/d} reaches a threshold tau. All functions here run on the host in float64: a plan is static.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from egrpo_jax.flow.grid import Times


def sigma(times: Times, step: int, noise_level: float) -> float:
    """Diffusion coefficient sigma_t = a sqrt(t / (1 - t)) of the SDE at grid step `step`.

    At t = 1 it is infinite; as in Flow-GRPO and the E-GRPO code the next time of the grid stands in for t in 1 - t.
    """
    time = times[step]
    remaining = 1 - (times[step + 1] if time == 1 else time)
    return noise_level * math.sqrt(time / remaining)


def exp_entropy(times: Times, step: int, merge: int, noise_level: float) -> float:
    """e^{h/d} = sqrt(2 pi e) sigma_t sqrt(dt) of the SDE step that starts at `step` and spans `merge` grid steps."""
    if not (0 <= step < step + merge < len(times)):
        raise ValueError(f"step {step} merging {merge} leaves the grid of {len(times) - 1} steps")
    span = times[step] - times[step + merge]
    return math.sqrt(2 * math.pi * math.e * span) * sigma(times, step, noise_level)


@dataclasses.dataclass(frozen=True)
class Merge:
    """The number of grid steps in one random step; `clamped` if even the longest span stays below the threshold."""

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
