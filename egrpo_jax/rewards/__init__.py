"""Scorers of images against their prompts."""

from egrpo_jax.rewards.base import Pending, Reward, start
from egrpo_jax.rewards.config import ScorersConfig
from egrpo_jax.rewards.registry import load_reward

__all__ = ["Pending", "Reward", "ScorersConfig", "load_reward", "start"]
