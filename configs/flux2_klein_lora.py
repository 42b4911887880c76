"""E-GRPO on LoRA adapters of FLUX.2-klein-base-4B (Apache-2.0), on one accelerator of 16 to 24 GB.

    python -m egrpo_jax.encode --config configs/flux2_klein_lora.py --out embeddings \\
        --prompt_file hpd_train.txt --prompt_file hpd_test.txt
    python -m egrpo_jax.train --config configs/flux2_klein_lora.py --config.model.published.embeddings=embeddings

The base is trained, guided by 4 away from the empty prompt: two passes of the model for a velocity. Few-step models
are reported to blur when they are trained themselves; adapters of the base load on the distilled klein-4B:

    python -m egrpo_jax.convert --workdir runs/flux2_klein_lora --to peft --out adapters
    python -m egrpo_jax.sample --config configs/flux2_klein_lora.py --prompt "a cat" --out images --grid pipeline \\
        --steps 4 --config.model.path=black-forest-labs/FLUX.2-klein-4B --config.model.published.lora_weights=adapters

Memory, computed: transformer 7.8 GB, VAE decoder 0.2 GB, 77 M adapter weights of rank 64 with gradients and moments in
float32 1.2 GB, one scorer in bfloat16 2.0 GB. Compiled for one TPU v5e of 15.75 GiB it takes 12.0 (rollout), 11.8
(decoding) and 12.7 GiB (update) with all that stays beside; --config.model.published.int8_base=True takes less.
Work, computed: at T = 8 with tails on every second step a prompt is 152 forward passes and 4 forward and backward
passes, each of 20.3 TFLOP with guidance. No time has been measured.
"""

import ml_collections

from egrpo_jax.pipelines import ModelConfig
from egrpo_jax.pipelines.published import LoraOptions, PublishedOptions
from egrpo_jax.rewards import ScorersConfig
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.optimizer import OptimConfig
from egrpo_jax.training.config import EvaluationConfig, RewardsConfig, TrainConfig, train_config

FLUX2_KLEIN_LORA = TrainConfig(
    name="flux2_klein_lora",
    num_iterations=300,
    prompts="hpd_train.txt",
    prompts_per_iteration=4,
    prompts_per_rollout=4,
    tails_per_device=2,
    model=ModelConfig(
        name="published",
        path="black-forest-labs/FLUX.2-klein-base-4B",
        published=PublishedOptions(height=512, width=512, decode_batch=1, lora=LoraOptions()),
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
    return train_config(FLUX2_KLEIN_LORA)
