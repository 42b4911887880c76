"""E-GRPO on LoRA adapters of FLUX.1-dev, on one accelerator of 80 to 140 GB.

    python -m egrpo_jax.encode --config configs/flux_lora.py --out embeddings \\
        --prompt_file hpd_train.txt --prompt_file hpd_test.txt
    python -m egrpo_jax.train --config configs/flux_lora.py --config.model.published.embeddings=embeddings

Adapters of rank 64 on Flow-GRPO's layers, or with configs/flux_lora.py:dance_grpo of rank 128 on DanceGRPO's; the base
weights stay in bfloat16. With embeddings made beforehand T5, 9.5 GB, is not loaded for training.

Memory, computed: transformer 23.8 GB, VAE decoder 0.2 GB, 179 M adapter weights with gradients and moments in float32
2.9 GB, three scorers in float32 11.8 GB; what is left holds activations: 512x512 pixels, 12 samples in the tails. With
--config.model.published.int8_base=True the transformer takes 12.0 GB.
Work, computed: at T = 8 with tails on every second step a prompt is 152 forward passes and 4 forward and backward
passes of 21.5 TFLOP, 3.5 PFLOP in all: 4 prompts at 40 % of 989 TFLOP/s take about 36 s an iteration, and 300
iterations 3 hours. Neither has been measured.
"""

import dataclasses

import ml_collections

from egrpo_jax.pipelines import ModelConfig
from egrpo_jax.pipelines.published import DANCE_GRPO, FLOW_GRPO, PublishedOptions
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.optimizer import OptimConfig
from egrpo_jax.training.config import EvaluationConfig, RewardsConfig, TrainConfig, train_config

ADAPTERS = {"flow_grpo": FLOW_GRPO, "dance_grpo": DANCE_GRPO}

FLUX_LORA = TrainConfig(
    name="flux_lora",
    num_iterations=300,
    prompts="hpd_train.txt",
    prompts_per_iteration=4,
    tails_per_device=12,
    model=ModelConfig(
        name="published",
        path="black-forest-labs/FLUX.1-dev",
        published=PublishedOptions(height=512, width=512),
    ),
    rewards=RewardsConfig(train=("hpsv2.1",), heldout=("clip_score", "pickscore")),
    plan=EGrpo(num_steps=8, tail_strides=(2,)),
    learner=LearnerConfig(updates="per_active_step", micro_batch=1),
    # Adapters take larger steps than whole weights: Flow-GRPO's rate.
    optim=OptimConfig(learning_rate=3e-4),
    evaluation=EvaluationConfig(prompts="hpd_test.txt", every=50, batch=8),
)


def get_config(adapters: str = "flow_grpo") -> ml_collections.ConfigDict:
    """The run on the adapters of "flow_grpo" or "dance_grpo"."""
    if adapters not in ADAPTERS:
        raise ValueError(f"configs/flux_lora.py has the adapters {sorted(ADAPTERS)}, found {adapters!r}")
    flux = dataclasses.replace(FLUX_LORA.model.published, lora=ADAPTERS[adapters])
    return train_config(dataclasses.replace(FLUX_LORA, model=dataclasses.replace(FLUX_LORA.model, published=flux)))
