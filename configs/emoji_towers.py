"""The embedded text encoder and reward towers. The text encoder comes first: all others read its vectors.

python -m egrpo_jax.pretrain --config configs/emoji_towers.py:text      (then :reward, :judge, :weak)
"""

import ml_collections

from egrpo_jax.common.config import to_config_dict
from egrpo_jax.pretraining.loop import Optim
from egrpo_jax.pretraining.text import TextJob
from egrpo_jax.pretraining.towers import TowerJob

JOBS = {
    "text": TextJob(),
    "reward": TowerJob("reward", "conv", 40, "generator", Optim(steps=900, batch_size=128, weight_decay=0.05), seed=1),
    "judge": TowerJob("judge", "mixer", 128, "augment", Optim(steps=900, batch_size=128, weight_decay=0.05), seed=2),
    "weak": TowerJob("weak", "conv", 40, "cast", Optim(steps=250, batch_size=64, weight_decay=0.05), seed=3),
}


def get_config(job: str) -> ml_collections.ConfigDict:
    if job not in JOBS:
        raise ValueError(f"{job!r} is not one of {', '.join(JOBS)}")
    return to_config_dict(JOBS[job])
