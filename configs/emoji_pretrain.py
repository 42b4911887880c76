"""The embedded flow model: a FLUX of 2.1 M parameters on 32x32 emoji, trained in two stages.

    python -m egrpo_jax.pretrain --config configs/emoji_pretrain.py:small --output small.safetensors
    python -m egrpo_jax.pretrain --config configs/emoji_pretrain.py --config.start_from=small.safetensors

The second stage adds a block to the first one's flow, which learns faster than starting with all of them. It ships
its last parameters, not their average: the images are as well composed but noisier, and noise is what RL removes.
"""

import ml_collections

from egrpo_jax.common.config import to_config_dict
from egrpo_jax.pretraining.flow import FlowJob
from egrpo_jax.pretraining.loop import Optim

STAGES = {
    "small": FlowJob(),
    "": FlowJob(
        seed=1,
        num_double_blocks=2,
        evaluate_every=500,
        target_recall=1.0,
        optim=Optim(steps=1500, batch_size=32, warmup=50, decay=False, ema=0.0),
    ),
}


def get_config(stage: str = "") -> ml_collections.ConfigDict:
    if stage not in STAGES:
        raise ValueError(f"{stage!r} is not one of {', '.join(map(repr, STAGES))}")
    return to_config_dict(STAGES[stage])
