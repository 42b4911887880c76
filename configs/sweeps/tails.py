"""The tails of `configs/flux_egrpo_fast.py` against full ones, at the paper's grid and group size, on the emoji model.

    python -m benchmarks.compare_algorithms --sweep=tails --seeds=3

Unlike the other sweeps', both entries have equal iterations: 400 and 1012 forward passes a prompt in each. Hardware: 2
CPU cores; the run of the paper's takes about 8 minutes on one of them.
"""

import dataclasses
from pathlib import Path
from runpy import run_path

import ml_collections

from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.training.config import train_config

SWEEP = run_path(str(Path(__file__).with_name("algorithms.py")))
VARIANTS = {"paper": EGrpo(), "fast": EGrpo(tail_strides=(), tail_steps=(4,))}
ENTRIES = tuple(VARIANTS)
ITERATIONS = 15
RATES = ("2e-4",)
"""E-GRPO's best in `configs/sweeps/algorithms.py`."""


def get_config(variant: str = "fast") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/sweeps/tails.py has the variants {sorted(VARIANTS)}, found {variant!r}")
    config = SWEEP["lasting"](SWEEP["entry"]("egrpo", plan=VARIANTS[variant]), ITERATIONS)
    return train_config(dataclasses.replace(config, name=variant))
