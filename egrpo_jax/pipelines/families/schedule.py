"""The shift of the time grid on which a published pipeline samples."""

from __future__ import annotations

import math

from egrpo_jax.flow.grid import resolution_shift
from egrpo_jax.weights.configs import Published


def scheduled_shift(scheduler: Published, image_tokens: int, num_steps: int) -> float:
    """A fixed shift, or one that grows with the image as that of FLUX.1, as the keys of `scheduler` say.

    Raises:
      UserError: the keys give none for images of `image_tokens`.
    """
    del num_steps
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
