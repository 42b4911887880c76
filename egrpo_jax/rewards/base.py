"""What a reward is, and how it is found by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import chex

from egrpo_jax.errors import UserError
from egrpo_jax.plugins import load_attribute

Reward = Callable[[chex.Array, Sequence[str]], chex.Array]
"""`(images[B, H, W, 3] in [0, 1], prompts) -> scores[B]`, float32, higher is better, always the same for the same."""

BUILT_IN = {
    "emoji": "egrpo_jax.rewards.emoji:cosine_to_reward",
    "emoji_judge": "egrpo_jax.rewards.emoji:cosine_to_judge",
    "emoji_weak": "egrpo_jax.rewards.emoji:cosine_to_weak",
    "emoji_judge_r1": "egrpo_jax.rewards.emoji:judge_recall_1",
    "emoji_judge_r10": "egrpo_jax.rewards.emoji:judge_recall_10",
}
"""Name of a built-in reward to `module:function`; the function, without arguments, makes the reward."""


def load_reward(name: str) -> Reward:
    """The built-in reward `name`, or a user's own: `module:attribute`, the attribute being the reward itself.

    Raises:
      UserError: there is no such reward; lists the built-in ones.
    """
    if name in BUILT_IN:
        return load_attribute(BUILT_IN[name], "reward")()
    if ":" not in name:
        raise UserError(f"unknown reward {name!r}; use one of {', '.join(BUILT_IN)}, or module:attribute of your own")
    reward = load_attribute(name, "reward")
    if not callable(reward) or isinstance(reward, type):
        raise UserError(f"the reward {name!r} is {reward!r}; it must be a function (images, prompts) -> scores")
    return reward
