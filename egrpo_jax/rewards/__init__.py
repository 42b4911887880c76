"""Rewards: how well images fit their prompts."""

from egrpo_jax.rewards.base import Pending, Reward, Scores, start
from egrpo_jax.rewards.checked import CheckedReward, RewardError
from egrpo_jax.rewards.config import ScorersConfig
from egrpo_jax.rewards.registry import load_reward

__all__ = [
    "CheckedReward",
    "Pending",
    "Reward",
    "RewardError",
    "ScorersConfig",
    "Scores",
    "load_reward",
    "start",
]
