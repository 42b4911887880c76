"""E-GRPO on the embedded text-to-emoji flow model, the whole method on a laptop.

    python -m egrpo_jax.train --config configs/emoji.py          # trains on the robust reward tower
    python -m egrpo_jax.train --config configs/emoji.py:hack     # trains on a tower with a flaw, and shows hacking

Hardware: 2 CPU cores are enough, and then a run takes 5 to 6 minutes. What to expect: docs/results/emoji.md.
"""

import dataclasses

from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.optimizer import OptimConfig
from egrpo_jax.training.config import EvaluationConfig, RewardsConfig, TrainConfig, train_config

JUDGES = ("emoji_judge", "emoji_judge_r1", "emoji_judge_r10")

EMOJI = TrainConfig(
    name="emoji",
    num_iterations=80,
    prompts="emoji_train",
    prompts_per_iteration=16,
    rewards=RewardsConfig(train=("emoji",), heldout=JUDGES),
    # Tails on every second step: half the cost, and the samples of a group compare alike.
    plan=EGrpo(num_steps=8, group_size=8, tail_strides=(2,)),
    learner=LearnerConfig(updates="per_active_step", ema_decay=0.9),
    # At twice this rate the noise of the updates undoes within 50 iterations what they gain.
    optim=OptimConfig(learning_rate=5e-5, b2=0.99),
    evaluation=EvaluationConfig(every=20, kept=200),
)

VARIANTS = {
    "": EMOJI,
    "hack": dataclasses.replace(
        EMOJI,
        name="emoji_hack",
        num_iterations=50,
        rewards=RewardsConfig(train=("emoji_weak",), heldout=("emoji", *JUDGES)),
        learner=LearnerConfig(updates="per_active_step", clip_range=1e-3),
        optim=OptimConfig(learning_rate=1e-4, b2=0.99),
        evaluation=EvaluationConfig(every=10, kept=200),
    ),
}


def get_config(variant: str = ""):
    """The config of a variant: "" or "hack"."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/emoji.py has the variants {sorted(VARIANTS)}, found {variant!r}")
    return train_config(VARIANTS[variant])
