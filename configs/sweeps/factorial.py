"""E-GRPO taken apart on the embedded emoji model: kernel, merges, weights of steps, epochs, and which steps are random.

    python -m egrpo_jax.train --config configs/sweeps/factorial.py:exact-none-flat

A variant is kernel-entropy-weights: "flow" (Euler's) or "exact"; steps that are brought to their entropy by "merge", by
"noise" alone, or "none"; "plain" or "flat" weights. Others are noise that adapts to its effect, one update for all
steps, epochs, the paper's ablations, and other tails. All have equal forward passes, as in
`configs/sweeps/algorithms.py`.
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
BASE = EGrpo(num_steps=8, group_size=8, tail_strides=(2,))
LEARNER = LearnerConfig(updates="per_active_step")
FLAT = dataclasses.replace(LEARNER, step_weights="flat", clip_range=4e-6)
ENTROPY = {"merge": {}, "none": {"entropy_threshold": 0.0}, "noise": {"entropy_by": "noise"}}
TAILS = {"tail_full": {"tail_strides": (1,)}} | {
    f"tail_2m_{count}": {"tail_strides": (), "tail_steps": (count,)} for count in (2, 3)
}
STEPS = {"first_quarter": (0, 1), "last_half": (4, 5, 6), "all_steps": tuple(range(7))}

FACTORS = {
    f"{kernel}-{entropy}-{weights}": (dataclasses.replace(BASE, **process, **ENTROPY[entropy]), learner)
    for (kernel, process), entropy, (weights, learner) in itertools.product(
        {"flow": {}, "exact": {"process": "exact_sde"}}.items(), ENTROPY, {"plain": LEARNER, "flat": FLAT}.items()
    )
}
ADAPTIVE = {"adaptive": (dataclasses.replace(FACTORS["exact-noise-plain"][0], adapt_every=5), LEARNER)}
EPOCHS = {
    f"epochs_{count}{'_mask' if mask else ''}": (
        BASE,
        dataclasses.replace(LEARNER, epochs=count, objective="kl_mask" if mask else "clip"),
    )
    for count, mask in itertools.product((2, 4), (False, True))
}
JOINT = {"joint_update": (BASE, LearnerConfig())}
ABLATIONS = (
    {f"tau_{tau}": (dataclasses.replace(BASE, entropy_threshold=tau), LEARNER) for tau in (1.8, 2.0, 2.4, 2.6)}
    | {
        f"merge_{length}": (dataclasses.replace(BASE, entropy_threshold=None, merges=(length,) * 4), LEARNER)
        for length in (2, 4)
    }
    | {name: (dataclasses.replace(BASE, active_steps=steps), LEARNER) for name, steps in STEPS.items()}
    | {name: (dataclasses.replace(BASE, **tails), LEARNER) for name, tails in TAILS.items()}
)
VARIANTS = FACTORS | ADAPTIVE | JOINT | EPOCHS | ABLATIONS
ENTRIES = tuple(VARIANTS)


def get_config(variant: str = "flow-merge-plain") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/sweeps/factorial.py has the variants {sorted(VARIANTS)}, found {variant!r}")
    plan, learner = VARIANTS[variant]
    return train_config(dataclasses.replace(SWEEP["entry"]("egrpo", plan=plan, learner=learner), name=variant))
