"""E-GRPO on LoRA adapters of Z-Image (Apache-2.0), on one accelerator of 24 to 32 GB, or on two of 16.

    python -m egrpo_jax.encode --config configs/z_image_lora.py --out embeddings \\
        --prompt_file hpd_train.txt --prompt_file hpd_test.txt
    python -m egrpo_jax.train --config configs/z_image_lora.py --config.model.published.embeddings=embeddings

Guided by 4 as Z-Image counts it, which is 5 elsewhere: two passes of the model for a velocity. Prompts have up to 128
tokens here, 20 of which are the form of the chat; longer ones are cut. More, up to the published 512, cost more:
--config.model.published.text_tokens=512. Z-Image-Turbo has the same sizes and is not guided:
--config.model.path=Tongyi-MAI/Z-Image-Turbo --config.model.published.guidance=0.

Memory, computed: transformer 12.3 GB, VAE decoder 0.2 GB, adapter weights of rank 64 with gradients and moments in
float32 2.5 GB, one scorer in bfloat16 2.0 GB.
Work, computed: at T = 8 with tails on every second step a prompt is 152 forward passes and 4 forward and backward
passes, each of 27.4 TFLOP with guidance. No time has been measured.
"""

import ml_collections

from egrpo_jax.pipelines import ModelConfig
from egrpo_jax.pipelines.published import LoraOptions, PublishedOptions
from egrpo_jax.rewards import ScorersConfig
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.optimizer import OptimConfig
from egrpo_jax.training.config import EvaluationConfig, RewardsConfig, TrainConfig, train_config

Z_IMAGE_LORA = TrainConfig(
    name="z_image_lora",
    num_iterations=300,
    prompts="hpd_train.txt",
    prompts_per_iteration=4,
    prompts_per_rollout=4,
    tails_per_device=2,
    model=ModelConfig(
        name="published",
        path="Tongyi-MAI/Z-Image",
        published=PublishedOptions(
            height=512, width=512, guidance=4.0, text_tokens=128, decode_batch=1, lora=LoraOptions()
        ),
    ),
    rewards=RewardsConfig(train=("hpsv2.1",)),
    scorers=ScorersConfig(dtype="bfloat16"),
    plan=EGrpo(num_steps=8, tail_strides=(2,)),
    learner=LearnerConfig(updates="per_active_step", micro_batch=1),
    optim=OptimConfig(learning_rate=3e-4),
    evaluation=EvaluationConfig(prompts="hpd_test.txt", every=50, batch=2),
)


def get_config() -> ml_collections.ConfigDict:
    """The run on adapters."""
    return train_config(Z_IMAGE_LORA)
