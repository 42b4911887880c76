"""The time grid that a published pipeline samples on: diffusers' scheduler_config.json.

Flow-matching pipelines of diffusers take T uniform times from 1 to 1/T and shift them, by a fixed number or by one that
grows with the image. Their scheduler can bend the grid in other ways; those are refused, for no shift stands for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from egrpo_jax.weights.configs import FLAG, NUMBER, POSITIVE, SIZE, Key, Kind, Published, one_of, read_config

CLASS_NAME = "FlowMatchEulerDiscreteScheduler"
FILE = "scheduler_config.json"

_UNUSED = Kind("false or null: only a shifted grid is sampled here", lambda value: not value)

KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "num_train_timesteps": Key(one_of(1000), 1000),  # the model's time is a thousandth of theirs
        "shift": Key(POSITIVE, 1.0),
        "use_dynamic_shifting": Key(FLAG, False),
        "base_shift": Key(NUMBER, 0.5),
        "max_shift": Key(NUMBER, 1.15),
        "base_image_seq_len": Key(SIZE, 256),
        "max_image_seq_len": Key(SIZE, 4096),
        "time_shift_type": Key(one_of("exponential", "linear"), "exponential"),
        "invert_sigmas": Key(_UNUSED, False),
        "shift_terminal": Key(_UNUSED, None),
        "use_karras_sigmas": Key(_UNUSED, False),
        "use_exponential_sigmas": Key(_UNUSED, False),
        "use_beta_sigmas": Key(_UNUSED, False),
        "stochastic_sampling": Key(_UNUSED, False),
    }
)
"""The keys that change the grid; diffusers ignores others, too."""


def read_scheduler(folder: str | os.PathLike[str]) -> Published:
    """All of `KEYS` as the scheduler in `folder` has them.

    Raises:
      UserError: the file is missing, of another scheduler, or asks for more than a shifted grid.
    """
    keys = read_config(folder, CLASS_NAME, FILE).checked(KEYS)
    if keys["use_dynamic_shifting"] and keys["base_image_seq_len"] == keys["max_image_seq_len"]:
        raise keys.error("max_image_seq_len", "another number than base_image_seq_len: a line goes through both")
    return keys
