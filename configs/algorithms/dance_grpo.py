"""DanceGRPO (arXiv:2505.07818) on all weights of FLUX.1-dev, on adapters, and on the embedded emoji model.

    python -m egrpo_jax.train --config configs/algorithms/dance_grpo.py
    python -m egrpo_jax.train --config configs/algorithms/dance_grpo.py:lora      # adapters of rank 128
    python -m egrpo_jax.train --config configs/algorithms/dance_grpo.py:emoji     # on a laptop

Published on 16 GPUs with a prompt each, "lora" on 8, in three updates of four samples of each prompt. Hardware: that of
configs/flux_egrpo.py, and of configs/flux_lora.py; no time has been measured.
"""

import ml_collections

from egrpo_jax.pipelines.published import DANCE_GRPO
from egrpo_jax.rl.algorithms.dance_grpo import DanceGrpo
from egrpo_jax.rl.update import LearnerConfig
from egrpo_jax.training.config import RewardsConfig
from egrpo_jax.training.tasks import choose, on_emoji, on_flux

LEARNER = LearnerConfig(minibatches=3)
HPS = RewardsConfig(train=("hpsv2.1",))

VARIANTS = {
    "": on_flux(DanceGrpo(), HPS, prompts=16, learning_rate=1e-5, learner=LEARNER),
    "lora": on_flux(DanceGrpo(num_steps=12), HPS, prompts=8, learning_rate=3e-4, learner=LEARNER, lora=DANCE_GRPO),
    "emoji": on_emoji(DanceGrpo(num_steps=8, group_size=8), LearnerConfig(minibatches=4)),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    return choose(VARIANTS, variant)
