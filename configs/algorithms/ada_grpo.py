"""AdaGRPO (arXiv:2606.06828) on all weights of FLUX.1-dev, and on the embedded emoji model.

    python -m egrpo_jax.train --config configs/algorithms/ada_grpo.py
    python -m egrpo_jax.train --config configs/algorithms/ada_grpo.py:emoji     # on a laptop

Published on 8 GPUs, each with a running mean of its own, and trained on HPSv3, which is not here: this is HPSv2.1, and
one mean of all. Ten prompts are walked for each that trains. Hardware: that of configs/flux_egrpo.py; no time has been
measured.
"""

import ml_collections

from egrpo_jax.rl.algorithms.ada_grpo import AdaGrpo
from egrpo_jax.training.config import RewardsConfig
from egrpo_jax.training.tasks import choose, on_emoji, on_flux

VARIANTS = {
    "": on_flux(AdaGrpo(), RewardsConfig(train=("hpsv2.1",)), prompts=8, learning_rate=2e-6, pixels=512),
    "emoji": on_emoji(AdaGrpo(num_steps=8, group_size=8, active_steps=(0, 1, 2, 3), candidates=4)),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    return choose(VARIANTS, variant)
