"""G2RPO (arXiv:2510.01982) on all weights of FLUX.1-dev, and on the embedded emoji model.

    python -m egrpo_jax.train --config configs/algorithms/g2rpo.py
    python -m egrpo_jax.train --config configs/algorithms/g2rpo.py:emoji     # on a laptop

Published on 16 GPUs with a prompt each, on HPSv2.1 and the CLIP score, with an update for each active step, as here.
The paper finds granularities 1, 2, 3 better than its code's 1, 2. Hardware: that of configs/flux_egrpo.py; no time has
been measured.
"""

import ml_collections

from egrpo_jax.rl.algorithms.g2rpo import G2rpo
from egrpo_jax.rl.update import LearnerConfig
from egrpo_jax.training.config import RewardsConfig
from egrpo_jax.training.tasks import choose, on_emoji, on_flux

LEARNER = LearnerConfig(updates="per_active_step")

VARIANTS = {
    "": on_flux(
        G2rpo(),
        RewardsConfig(train=("hpsv2.1", "clip_score"), weights=(1.0, 1.0)),
        prompts=16,
        learning_rate=2e-6,
        learner=LEARNER,
    ),
    "emoji": on_emoji(G2rpo(num_steps=8, group_size=8, active=4), learner=LEARNER),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    return choose(VARIANTS, variant)
