"""Scorers of images against their prompts."""

from egrpo_jax.rewards.base import Reward, load_reward

__all__ = ["Reward", "load_reward"]
