"""AWM, Advantage Weighted Matching, on LoRA adapters of FLUX.1-dev, and on the embedded emoji model.

    python -m egrpo_jax.train --config configs/algorithms/awm.py
    python -m egrpo_jax.train --config configs/algorithms/awm.py:emoji     # on a laptop

Its authors trained SD3.5; for FLUX these are the settings of Flow-Factory, at 512x512 pixels. The shift is that of
diffusers' grid there, e^0.63. Hardware: that of configs/flux_lora.py for each prompt that is rolled out at once; no
time has been measured.
"""

import ml_collections

from egrpo_jax.pipelines.published import FLOW_GRPO
from egrpo_jax.rl.algorithms.awm import Awm
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.training.config import RewardsConfig
from egrpo_jax.training.tasks import choose, on_emoji, on_flux

# A clip range of 1 clips nothing; advantages end at plus and minus 1.
LEARNER = LearnerConfig(clip_range=1.0, advantage_clip=1.0, trailing_decay=0.3, trailing_weight=0.1)

VARIANTS = {
    "": on_flux(
        Awm(num_steps=10, shift=1.878, group_size=16, pairs=4, noisiest=0.7),
        RewardsConfig(train=("pickscore",), std_of="all"),
        prompts=48,
        learning_rate=3e-4,
        learner=LEARNER,
        pixels=512,
        lora=FLOW_GRPO,
    ),
    "emoji": on_emoji(Awm(num_steps=8, group_size=8, pairs=4), LEARNER, RewardsConfig(std_of="all")),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    return choose(VARIANTS, variant)
