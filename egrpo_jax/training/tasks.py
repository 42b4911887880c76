"""Two tasks that `configs/algorithms/` set every algorithm: FLUX.1-dev as published, and the embedded emoji model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import ml_collections

from egrpo_jax.parallel.mesh import MeshConfig
from egrpo_jax.pipelines import ModelConfig
from egrpo_jax.pipelines.published import LoraOptions, PublishedOptions
from egrpo_jax.rl.algorithms.base import Algorithm
from egrpo_jax.rl.optimizer import OptimConfig
from egrpo_jax.rl.update import LearnerConfig
from egrpo_jax.training.config import EvaluationConfig, RewardsConfig, TrainConfig, train_config

FLUX_REWARDS = ("hpsv2.1", "clip_score", "pickscore", "imagereward")
EMOJI_JUDGES = ("emoji_judge", "emoji_judge_r1", "emoji_judge_r10")
LEARNER, REWARDS = LearnerConfig(), RewardsConfig()


def on_flux(
    plan: Algorithm,
    rewards: RewardsConfig,
    prompts: int,
    learning_rate: float,
    learner: LearnerConfig = LEARNER,
    pixels: int = 720,
    lora: LoraOptions | None = None,
) -> TrainConfig:
    """An algorithm on FLUX.1-dev.

    Args:
      plan, learner: the algorithm's.
      rewards: those that train; the others are held out.
      prompts: in an iteration, a multiple of the 8 that are rolled out at once.
      learning_rate: of AdamW.
      pixels: height and width of the images.
      lora: adapters to train, their base whole on each device; None trains all weights, which all devices share.
    """
    options = PublishedOptions(height=pixels, width=pixels, lora=lora)
    return TrainConfig(
        prompts="hpd_train.txt",
        prompts_per_iteration=prompts,
        prompts_per_rollout=8,
        tails_per_device=12,
        model=ModelConfig(name="published", path="black-forest-labs/FLUX.1-dev", published=options),
        rewards=dataclasses.replace(rewards, heldout=tuple(r for r in FLUX_REWARDS if r not in rewards.train)),
        plan=plan,
        learner=dataclasses.replace(learner, micro_batch=1),
        optim=OptimConfig(learning_rate=learning_rate),
        evaluation=EvaluationConfig(prompts="hpd_test.txt", every=50, batch=8),
        mesh=MeshConfig() if lora else MeshConfig(data=1, fsdp=-1),
    )


def on_emoji(plan: Algorithm, learner: LearnerConfig = LEARNER, rewards: RewardsConfig = REWARDS) -> TrainConfig:
    """An algorithm on the embedded model, a small run for a laptop; all else is that of configs/emoji.py.

    Args:
      plan, learner: the algorithm's.
      rewards: how they are normalised.
    """
    return TrainConfig(
        num_iterations=80,
        prompts_per_iteration=16,
        rewards=dataclasses.replace(rewards, heldout=EMOJI_JUDGES),
        plan=plan,
        learner=dataclasses.replace(learner, ema_decay=0.9),
        optim=OptimConfig(learning_rate=5e-5, b2=0.99),
        evaluation=EvaluationConfig(every=20, kept=200),
    )


def choose(variants: Mapping[str, TrainConfig], variant: str) -> ml_collections.ConfigDict:
    """A config file's variant, the run being called by its algorithm and variant.

    Raises:
      ValueError: there is no such variant.
    """
    algorithm = variants[""].plan.algorithm
    if variant not in variants:
        raise ValueError(f"configs/algorithms/{algorithm}.py has the variants {sorted(variants)}, found {variant!r}")
    return train_config(dataclasses.replace(variants[variant], name="_".join(filter(None, (algorithm, variant)))))
