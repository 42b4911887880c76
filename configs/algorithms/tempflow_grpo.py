"""TempFlow-GRPO (arXiv:2508.04324) on LoRA adapters of FLUX.1-dev, and on the embedded emoji model.

    python -m egrpo_jax.train --config configs/algorithms/tempflow_grpo.py
    python -m egrpo_jax.train --config configs/algorithms/tempflow_grpo.py:emoji     # on a laptop

Published with 48 prompts an iteration, in two updates of half of them each, and a KL penalty of 0.004; here it is one
joint update, and there is no penalty. The shift is that of diffusers' grid at 1024x1024 pixels, e^1.15. Hardware: that
of configs/flux_lora.py, with activations of 4608 tokens; no time has been measured.
"""

import dataclasses

import ml_collections

from egrpo_jax.pipelines.published import FLOW_GRPO
from egrpo_jax.rl.algorithms.tempflow_grpo import TempFlowGrpo
from egrpo_jax.rl.update import LearnerConfig
from egrpo_jax.training.config import RewardsConfig
from egrpo_jax.training.tasks import choose, on_emoji, on_flux

VARIANTS = {
    "": on_flux(
        TempFlowGrpo(shift=3.158),
        RewardsConfig(train=("pickscore",)),
        prompts=48,
        learning_rate=3e-4,
        # 0.9 every eight updates, four iterations.
        learner=LearnerConfig(step_weights="noise", ema_decay=0.974),
        pixels=1024,
        lora=dataclasses.replace(FLOW_GRPO, rank=32, alpha=64.0),
    ),
    "emoji": on_emoji(TempFlowGrpo(num_steps=8, group_size=4, seeds=2), learner=LearnerConfig(step_weights="noise")),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    return choose(VARIANTS, variant)
