"""E-GRPO: the plan of an iteration, its rollout, advantages, the loss and the update."""

from egrpo_jax.rl.advantage import credit, group_advantage
from egrpo_jax.rl.loss import LossStats, clipped_ratio_loss, kl_masked_loss
from egrpo_jax.rl.optimizer import OptimConfig, make_optimizer
from egrpo_jax.rl.plan import Branch, Plan, PlanConfig, describe, make_plan
from egrpo_jax.rl.rollout import Rollout, Transitions, prompt_keys, roll_out
from egrpo_jax.rl.update import LearnerConfig, TrainState, UpdateStats, init_state, score_samples, update_policy

__all__ = [
    "Branch",
    "LearnerConfig",
    "LossStats",
    "OptimConfig",
    "Plan",
    "PlanConfig",
    "Rollout",
    "TrainState",
    "Transitions",
    "UpdateStats",
    "clipped_ratio_loss",
    "credit",
    "describe",
    "group_advantage",
    "init_state",
    "kl_masked_loss",
    "make_optimizer",
    "make_plan",
    "prompt_keys",
    "roll_out",
    "score_samples",
    "update_policy",
]
