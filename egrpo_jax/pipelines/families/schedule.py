"""The time grids on which published pipelines sample."""

from __future__ import annotations

import math

import numpy as np

from egrpo_jax.flow.grid import Times, resolution_shift, shift_times, shifted_times
from egrpo_jax.weights.configs import Published


def scheduled_times(scheduler: Published, image_tokens: int, num_steps: int) -> Times:
    """Uniform times, shifted as the keys of `scheduler` say: by a fixed number, or as FLUX.1's, by the image's tokens.

    Raises:
      UserError: the keys give no shift for images of `image_tokens`.
    """
    return shifted_times(num_steps, _shift(scheduler, image_tokens))


def twice_shifted_times(scheduler: Published, image_tokens: int, num_steps: int) -> Times:
    """The grid of a pipeline that leaves times to the scheduler of diffusers: from 1 to a thousandth, shifted, evenly
    spaced, then shifted once more; and 0.

    Raises:
      UserError: as `scheduled_times`.
    """
    shift = _shift(scheduler, image_tokens)
    last = shift_times(np.array(1 / scheduler["num_train_timesteps"]), shift)
    return (*shift_times(np.linspace(1.0, last, num_steps), shift).tolist(), 0.0)


def _shift(scheduler: Published, image_tokens: int) -> float:
    if not scheduler["use_dynamic_shifting"]:
        return scheduler["shift"]
    small, large = ((scheduler[f"{end}_image_seq_len"], scheduler[f"{end}_shift"]) for end in ("base", "max"))
    try:
        shift = resolution_shift(image_tokens, small, large)
    except OverflowError:
        shift = math.inf
    if scheduler["time_shift_type"] == "linear" and 0 < shift < math.inf:
        shift = math.log(shift)  # mu itself, not e^mu
    if not 0 < shift < math.inf:
        raise scheduler.error("max_shift", f"less extreme: {image_tokens} image tokens have a shift of {shift:g}")
    return shift
