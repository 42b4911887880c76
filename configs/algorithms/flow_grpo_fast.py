"""Flow-GRPO-Fast, of the code of arXiv:2505.05470, on LoRA adapters of FLUX.1-dev, and on the embedded emoji model.

    python -m egrpo_jax.train --config configs/algorithms/flow_grpo_fast.py
    python -m egrpo_jax.train --config configs/algorithms/flow_grpo_fast.py:emoji     # on a laptop

The run of its code on PickScore, 32 GPUs: 48 prompts an iteration, in two updates of half of the samples each. At T = 6
the window of 3 is always the first half. The shift is that of diffusers' grid at 512x512 pixels, e^0.63. Hardware: that
of configs/flux_lora.py for each prompt that is rolled out at once; no time has been measured.
"""

import ml_collections

from egrpo_jax.pipelines.published import FLOW_GRPO
from egrpo_jax.rl.algorithms.flow_grpo_fast import FlowGrpoFast
from egrpo_jax.rl.update import LearnerConfig
from egrpo_jax.training.config import RewardsConfig
from egrpo_jax.training.tasks import choose, on_emoji, on_flux

VARIANTS = {
    "": on_flux(
        FlowGrpoFast(shift=1.878),
        RewardsConfig(train=("pickscore",)),
        prompts=48,
        learning_rate=3e-4,
        # 0.9 every eight updates, four iterations.
        learner=LearnerConfig(minibatches=2, clip_range=1e-5, ema_decay=0.974),
        pixels=512,
        lora=FLOW_GRPO,
    ),
    "emoji": on_emoji(FlowGrpoFast(num_steps=8, group_size=8), LearnerConfig(minibatches=2)),
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The config of one of `VARIANTS`."""
    return choose(VARIANTS, variant)
