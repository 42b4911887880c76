"""E-GRPO's three factors on the embedded emoji model: its kernel, how steps get their entropy, and what they weigh.

    python -m egrpo_jax.train --config configs/sweeps/factorial.py:exact-none-flat

A variant is kernel-entropy-weights: "flow" (Euler's) or "exact"; steps that are brought to their entropy by "merge", by
"noise" alone, or "none"; "plain" or "flat" weights. "adaptive" is exact-noise-plain with noise that follows its effect,
"joint" is flow-merge-plain with one update for all steps. All have equal forward passes, half of those in
`configs/sweeps/algorithms.py`, and their learning rates tuned.
"""

import dataclasses
import itertools
from pathlib import Path
from runpy import run_path

import ml_collections

from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.training.config import train_config

SWEEP = run_path(str(Path(__file__).with_name("algorithms.py")))
BUDGET, RATES = SWEEP["BUDGET"] // 2, SWEEP["RATES"]
PLAN = EGrpo(num_steps=8, group_size=8, tail_strides=(2,))
PLAIN = LearnerConfig(updates="per_active_step")
FLAT = dataclasses.replace(PLAIN, step_weights="flat", clip_range=4e-6)
KERNELS = {"flow": {}, "exact": {"process": "exact_sde"}}
ENTROPY = {"merge": {}, "none": {"entropy_threshold": 0.0}, "noise": {"entropy_by": "noise"}}

VARIANTS = {
    f"{kernel}-{entropy}-{weights}": (dataclasses.replace(PLAN, **process, **by), learner)
    for (kernel, process), (entropy, by), (weights, learner) in itertools.product(
        KERNELS.items(), ENTROPY.items(), {"plain": PLAIN, "flat": FLAT}.items()
    )
}
VARIANTS["adaptive"] = (dataclasses.replace(VARIANTS["exact-noise-plain"][0], adapt_every=5), PLAIN)
VARIANTS["joint"] = (PLAN, LearnerConfig())
ENTRIES = tuple(VARIANTS)


def get_config(variant: str = "flow-merge-plain") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/sweeps/factorial.py has the variants {sorted(VARIANTS)}, found {variant!r}")
    plan, learner = VARIANTS[variant]
    config = SWEEP["entry"]("egrpo", BUDGET, plan=plan, learner=learner)
    return train_config(dataclasses.replace(config, name=variant))
