"""V-GRPO (arXiv:2604.23380) on all weights of FLUX.1-dev, and on the embedded emoji model.

    python -m egrpo_jax.train --config configs/algorithms/v_grpo.py
    python -m egrpo_jax.train --config configs/algorithms/v_grpo.py:emoji     # on a laptop

Its group size and learning rate for FLUX are not known to us: these are MixGRPO's, with which it is compared.
Hardware: that of configs/flux_egrpo.py; no time has been measured.
"""

import ml_collections

from egrpo_jax.rl.algorithms.v_grpo import VGrpo
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.training.config import RewardsConfig
from egrpo_jax.training.tasks import choose, on_emoji, on_flux

LEARNER = LearnerConfig(clip_range=1e-2)

VARIANTS = {
    "": on_flux(
        VGrpo(soft_clip=3.0),
        RewardsConfig(train=("hpsv2.1", "pickscore", "imagereward"), weights=(1.0, 1.0, 1.0)),
        prompts=32,
        learning_rate=1e-5,
        learner=LEARNER,
    ),
    "emoji": on_emoji(VGrpo(num_steps=8, group_size=8, soft_clip=3.0), LEARNER),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    return choose(VARIANTS, variant)
