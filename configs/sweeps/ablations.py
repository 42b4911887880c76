"""E-GRPO with one thing changed, on the embedded emoji model: the paper's ablations, epochs and tails.

    python -m egrpo_jax.train --config configs/sweeps/ablations.py:tau_1.8

All have equal forward passes, as in `configs/sweeps/factorial.py`, and E-GRPO's learning rate.
"""

import dataclasses
import itertools
from pathlib import Path
from runpy import run_path

import ml_collections

from egrpo_jax.training.config import train_config

FACTORIAL = run_path(str(Path(__file__).with_name("factorial.py")))
BUDGET, PLAN, LEARNER = FACTORIAL["BUDGET"], FACTORIAL["PLAN"], FACTORIAL["PLAIN"]
RATES = ("2e-4",)
"""E-GRPO's best in `configs/sweeps/algorithms.py`."""

PLANS = (
    {f"tau_{tau}": {"entropy_threshold": tau} for tau in (1.8, 2.0, 2.4, 2.6)}
    | {f"merge_{length}": {"entropy_threshold": None, "merges": (length,) * 4} for length in (2, 4)}
    | {
        name: {"active_steps": steps}
        for name, steps in {"first_quarter": (0, 1), "last_half": (4, 5, 6), "all_steps": tuple(range(7))}.items()
    }
    | {"tail_full": {"tail_strides": (1,)}}
    | {f"tail_2m_{count}": {"tail_strides": (), "tail_steps": (count,)} for count in (2, 3)}
)
EPOCHS = {
    f"epochs_{epochs}{'_mask' if objective == 'kl_mask' else ''}": {"epochs": epochs, "objective": objective}
    for epochs, objective in itertools.product((1, 2, 4), ("clip", "kl_mask"))
    if (epochs, objective) != (1, "clip")  # that is E-GRPO
}
VARIANTS = {
    "egrpo": (PLAN, LEARNER),
    **{name: (dataclasses.replace(PLAN, **changes), LEARNER) for name, changes in PLANS.items()},
    **{name: (PLAN, dataclasses.replace(LEARNER, **changes)) for name, changes in EPOCHS.items()},
}
ENTRIES = tuple(VARIANTS)


def get_config(variant: str = "egrpo") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/sweeps/ablations.py has the variants {sorted(VARIANTS)}, found {variant!r}")
    plan, learner = VARIANTS[variant]
    config = FACTORIAL["SWEEP"]["entry"]("egrpo", BUDGET, plan=plan, learner=learner)
    return train_config(dataclasses.replace(config, name=variant))
