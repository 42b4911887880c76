"""BranchGRPO (arXiv:2509.06040) on all weights of FLUX.1-dev, and on the embedded emoji model.

    python -m egrpo_jax.train --config configs/algorithms/branch_grpo.py
    python -m egrpo_jax.train --config configs/algorithms/branch_grpo.py:pruned     # five steps do not train
    python -m egrpo_jax.train --config configs/algorithms/branch_grpo.py:emoji      # on a laptop

Published on 8 GPUs with two prompts each, in about 18 updates of 12 edges of each tree. Hardware: that of
configs/flux_egrpo.py; no time has been measured.
"""

import dataclasses

import ml_collections

from egrpo_jax.rl.algorithms.branch_grpo import BranchGrpo
from egrpo_jax.rl.update import LearnerConfig
from egrpo_jax.training.config import RewardsConfig
from egrpo_jax.training.tasks import choose, on_emoji, on_flux

FLUX = on_flux(
    BranchGrpo(),
    RewardsConfig(train=("hpsv2.1",)),
    prompts=16,
    learning_rate=1e-5,
    learner=LearnerConfig(minibatches=18, clip_range=1e-3),
)

VARIANTS = {
    "": FLUX,
    "pruned": dataclasses.replace(FLUX, plan=BranchGrpo(pruned=5)),
    "emoji": on_emoji(BranchGrpo(num_steps=8, group_size=8, splits=(0, 1, 2)), LearnerConfig(minibatches=4)),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    return choose(VARIANTS, variant)
