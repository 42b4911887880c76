"""E-GRPO (arXiv:2601.00423) on all weights of FLUX.1-dev, and on the embedded emoji model.

    python -m egrpo_jax.train --config configs/algorithms/egrpo.py             # as in the paper, on HPSv2.1
    python -m egrpo_jax.train --config configs/algorithms/egrpo.py:repaired
    python -m egrpo_jax.train --config configs/algorithms/egrpo.py:emoji       # on a laptop

"" is `hps` of configs/flux_egrpo.py, where hardware and cost are, and "emoji" is configs/emoji.py. "repaired" takes
what the paper's merged steps approximate: steps that keep the marginals, each with just the noise that brings it to the
entropy threshold, and losses of which all steps weigh alike. The paper: 8 GPUs with a prompt each, an update of all.
"""

import dataclasses

import ml_collections

from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.update import LearnerConfig
from egrpo_jax.training.config import RewardsConfig
from egrpo_jax.training.tasks import choose, on_emoji, on_flux

FLUX = on_flux(EGrpo(), RewardsConfig(train=("hpsv2.1",)), prompts=8, learning_rate=2e-6)

VARIANTS = {
    "": FLUX,
    "repaired": dataclasses.replace(
        FLUX,
        plan=EGrpo(process="exact_sde", entropy_by="noise"),
        # The range that is published for "flat", whose ratios are to the power of the std.
        learner=dataclasses.replace(FLUX.learner, step_weights="flat", clip_range=4e-6),
    ),
    "emoji": on_emoji(
        EGrpo(num_steps=8, group_size=8, tail_strides=(2,)), learner=LearnerConfig(updates="per_active_step")
    ),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    return choose(VARIANTS, variant)
