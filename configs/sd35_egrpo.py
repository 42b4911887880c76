"""E-GRPO on all weights of Stable Diffusion 3.5 Medium, the paper's settings on a smaller model.

    python -m egrpo_jax.train --config configs/sd35_egrpo.py
    python -m egrpo_jax.train --config configs/sd35_egrpo.py:large      # 8.1 B parameters, guidance 3.5

16 steps of which the first eight are random one at a time, groups of 12, guided in rollout and update alike. Prompts
are a file of your own, by default `hpd_train.txt`; `python -m egrpo_jax.encode` makes their embeddings once:
--config.model.published.embeddings=FOLDER.

Memory, computed, on each of D devices: weights and two moments in float32 are 27 GB / D (Large: 97), gradients 9 GB / D
(32), the working copy in bfloat16 4.5 GB / D (16), and four scorers in float32 13.6 GB / D.
Work, computed, at 512x512: a prompt is 1012 forward passes in the rollout and 8 forward and backward passes of 4.9
TFLOP, 5.1 PFLOP in all (Large: 16.7). No time has been measured.
"""

import dataclasses

import ml_collections

from egrpo_jax.parallel.mesh import MeshConfig
from egrpo_jax.pipelines import ModelConfig
from egrpo_jax.pipelines.published import PublishedOptions
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.training.config import EvaluationConfig, RewardsConfig, TrainConfig, train_config

MODELS = {"medium": "stabilityai/stable-diffusion-3.5-medium", "large": "stabilityai/stable-diffusion-3.5-large"}

SD35 = TrainConfig(
    name="sd35_egrpo",
    num_iterations=300,
    prompts="hpd_train.txt",
    prompts_per_iteration=8,
    tails_per_device=12,
    model=ModelConfig(name="published", published=PublishedOptions(height=512, width=512)),
    rewards=RewardsConfig(train=("hpsv2.1",), heldout=("clip_score", "pickscore", "imagereward")),
    learner=LearnerConfig(micro_batch=1),
    evaluation=EvaluationConfig(prompts="hpd_test.txt", every=50, batch=8),
    mesh=MeshConfig(data=1, fsdp=-1),
)


def get_config(size: str = "medium") -> ml_collections.ConfigDict:
    """The run on the model of `size`, "medium" or "large"."""
    if size not in MODELS:
        raise ValueError(f"configs/sd35_egrpo.py has the models {sorted(MODELS)}, found {size!r}")
    model = dataclasses.replace(SD35.model, path=MODELS[size])
    return train_config(dataclasses.replace(SD35, name=f"sd35_{size}_egrpo", model=model))
