"""Algorithms and their plans, rollouts, advantages, the loss and the update."""

from egrpo_jax.rl.advantage import credit, group_advantage
from egrpo_jax.rl.algorithms.base import Algorithm, StepAlgorithm
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.loss import LossStats, clipped_ratio_loss, kl_masked_loss
from egrpo_jax.rl.objective import Objective, score_samples
from egrpo_jax.rl.optimizer import OptimConfig, make_optimizer
from egrpo_jax.rl.plan import AnchorPlan, Branch, Plan, describe
from egrpo_jax.rl.rollout import roll_out
from egrpo_jax.rl.transitions import Rollout, Transitions, prompt_keys
from egrpo_jax.rl.tree import TreePlan
from egrpo_jax.rl.update import TrainState, UpdateStats, init_state, update_policy

__all__ = [
    "Algorithm",
    "AnchorPlan",
    "Branch",
    "EGrpo",
    "LearnerConfig",
    "LossStats",
    "Objective",
    "OptimConfig",
    "Plan",
    "Rollout",
    "StepAlgorithm",
    "TrainState",
    "Transitions",
    "TreePlan",
    "UpdateStats",
    "clipped_ratio_loss",
    "credit",
    "describe",
    "group_advantage",
    "init_state",
    "kl_masked_loss",
    "make_optimizer",
    "prompt_keys",
    "roll_out",
    "score_samples",
    "update_policy",
]
