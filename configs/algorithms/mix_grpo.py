"""MixGRPO and MixGRPO-Flash (arXiv:2507.21802) on all weights of FLUX.1-dev, and on the embedded emoji model.

    python -m egrpo_jax.train --config configs/algorithms/mix_grpo.py
    python -m egrpo_jax.train --config configs/algorithms/mix_grpo.py:flash            # fewer steps after the window
    python -m egrpo_jax.train --config configs/algorithms/mix_grpo.py:flash_frozen     # 8 steps in all
    python -m egrpo_jax.train --config configs/algorithms/mix_grpo.py:emoji            # on a laptop

Published on 32 GPUs with a prompt each, in four updates of three samples of each prompt. Hardware: that of
configs/flux_egrpo.py; no time has been measured.
"""

import dataclasses

import ml_collections

from egrpo_jax.rl.algorithms.mix_grpo import MixGrpo
from egrpo_jax.rl.update import LearnerConfig
from egrpo_jax.training.config import RewardsConfig
from egrpo_jax.training.tasks import choose, on_emoji, on_flux

REWARDS = RewardsConfig(train=("hpsv2.1", "pickscore", "imagereward"), weights=(1.0, 1.0, 1.0))
LEARNER = LearnerConfig(minibatches=4)
FLUX = on_flux(MixGrpo(), REWARDS, prompts=32, learning_rate=1e-5, learner=LEARNER)

VARIANTS = {
    "": FLUX,
    "flash": dataclasses.replace(FLUX, plan=MixGrpo(tail_share=0.4)),
    "flash_frozen": dataclasses.replace(FLUX, plan=MixGrpo(moves="frozen", tail_share=0.2)),
    # In its 80 iterations the window comes about as far as in the published 300, near the middle of the grid.
    "emoji": on_emoji(MixGrpo(num_steps=8, group_size=8, window=2, move_every=25), LEARNER),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    return choose(VARIANTS, variant)
