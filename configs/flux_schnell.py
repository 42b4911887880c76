"""E-GRPO on LoRA adapters of FLUX.1-schnell, whose licence (Apache-2.0) lets results be used freely.

    python -m egrpo_jax.train --config configs/flux_schnell.py

schnell is distilled to few steps: it samples 4, on a grid without shift, has no guidance input, and reads 256 text
tokens. Training takes 8 steps on the shifted grid, so that there are early steps to choose from.

Memory and work, computed: those of configs/flux_lora.py with 1280 instead of 1536 tokens, 17.7 TFLOP a forward pass:
about 30 s an iteration on one accelerator of 989 TFLOP/s at 40 %. Neither has been measured.
"""

import ml_collections

from egrpo_jax.pipelines import ModelConfig
from egrpo_jax.pipelines.published import FLOW_GRPO, PublishedOptions
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.optimizer import OptimConfig
from egrpo_jax.training.config import EvaluationConfig, RewardsConfig, TrainConfig, train_config

FLUX_SCHNELL = TrainConfig(
    name="flux_schnell",
    num_iterations=300,
    prompts="hpd_train.txt",
    prompts_per_iteration=4,
    tails_per_device=12,
    model=ModelConfig(
        name="published",
        path="black-forest-labs/FLUX.1-schnell",
        published=PublishedOptions(height=512, width=512, text_tokens=256, lora=FLOW_GRPO),
    ),
    rewards=RewardsConfig(train=("hpsv2.1",), heldout=("clip_score", "pickscore")),
    plan=EGrpo(num_steps=8, tail_strides=(2,)),
    learner=LearnerConfig(updates="per_active_step", micro_batch=1),
    optim=OptimConfig(learning_rate=3e-4),
    evaluation=EvaluationConfig(prompts="hpd_test.txt", every=50, batch=8),
)


def get_config() -> ml_collections.ConfigDict:
    return train_config(FLUX_SCHNELL)
