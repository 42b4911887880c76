r"""The entropy of a random step, and the two ways to bring it to a threshold.

A Gaussian step of standard deviation std has, per latent dimension, the differential entropy

    h / d = 1/2 log(2 pi e std^2),      e^{h/d} = sqrt(2 pi e) std.

E-GRPO (arXiv:2601.00423, section 4) merges l grid steps into one random step, l being the smallest number for which
e^{h/d} reaches a threshold tau. Where a step may have any std, `ExactByStd` and `FlowByStd`, it reaches tau without a
merge. All functions here run on the host in float64: a plan is static.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from egrpo_jax.flow.grid import Times, ends
from egrpo_jax.flow.process import ExactByStd, Process, Stds

_EXP_ENTROPY = math.sqrt(2 * math.pi * math.e)  # of a step of std 1


def exp_entropy(process: Process, times: Times, step: int, merge: int) -> float:
    """e^{h/d} = sqrt(2 pi e) std of the step of `process` that starts at `step` and spans `merge` grid steps."""
    noise = process.noise(times, step, merge)
    return exp_entropy_of(float(process.std(*ends(times, step, merge), noise)))


def exp_entropy_of(std: float) -> float:
    """e^{h/d} = sqrt(2 pi e) std."""
    return _EXP_ENTROPY * std


def noise_by_entropy(threshold: float, by_std: Callable[[Stds], Process] = ExactByStd) -> Process:
    """The process whose single steps have e^{h/d} = `threshold`.

    Of `ExactByStd` all noise is fresh where t' is too small for that.
    """
    return by_std((threshold / _EXP_ENTROPY,))


@dataclasses.dataclass(frozen=True)
class Merge:
    """The number of grid steps in one random step; `clamped` if no span brings it to the threshold."""

    length: int
    clamped: bool = False


def merge_by_entropy(process: Process, times: Times, step: int, threshold: float) -> Merge:
    """The smallest merge whose e^{h/d} is at least `threshold` (E-GRPO's rule).

    A late step may reach the end of the grid before it reaches the threshold: then it is the merge of the largest
    e^{h/d}, and says so. With `FlowSde` that is all that is left.
    """
    ends(times, step, 1)
    lengths = range(1, len(times) - step)
    entropies = [exp_entropy(process, times, step, length) for length in lengths]
    for length, entropy in zip(lengths, entropies, strict=True):
        if entropy >= threshold:
            return Merge(length)
    return Merge(1 + entropies.index(max(entropies)), clamped=True)


def merges_by_entropy(process: Process, times: Times, steps: Sequence[int], threshold: float) -> tuple[Merge, ...]:
    """`merge_by_entropy` for each of `steps`."""
    return tuple(merge_by_entropy(process, times, step, threshold) for step in steps)
