"""Rewards by their names."""

from __future__ import annotations

import inspect
from typing import Any

from jax.sharding import Mesh

from egrpo_jax.common.errors import UserError, under
from egrpo_jax.common.plugins import load_attribute
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.rewards.base import Reward
from egrpo_jax.rewards.checked import CheckedReward, blamed
from egrpo_jax.rewards.config import ScorersConfig

BUILT_IN = {
    "emoji": "egrpo_jax.rewards.emoji:cosine_to_reward",
    "emoji_judge": "egrpo_jax.rewards.emoji:cosine_to_judge",
    "emoji_weak": "egrpo_jax.rewards.emoji:cosine_to_weak",
    "emoji_judge_r1": "egrpo_jax.rewards.emoji:judge_recall_1",
    "emoji_judge_r10": "egrpo_jax.rewards.emoji:judge_recall_10",
    "hpsv2.1": "egrpo_jax.rewards.clip:hpsv2_1",
    "hpsv2.0": "egrpo_jax.rewards.clip:hpsv2_0",
    "clip_score": "egrpo_jax.rewards.clip:clip_score",
    "pickscore": "egrpo_jax.rewards.clip:pickscore",
    "aesthetic": "egrpo_jax.rewards.clip:aesthetic",
    "imagereward": "egrpo_jax.rewards.imagereward:imagereward",
    "ocr": "egrpo_jax.rewards.ocr:ocr",
    "jpeg_compressibility": "egrpo_jax.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "egrpo_jax.rewards.jpeg:incompressibility",
}
"""Name of a built-in reward to `module:function`; the function, of the config and the mesh, makes the reward."""


def load_reward(name: str, scorers: ScorersConfig | None = None, mesh: Mesh | None = None) -> CheckedReward:
    """The reward `name`: a built-in one, one of `scorers.remote`, or a user's own, `module:attribute`.

    By default files are those of `ScorersConfig()` and the parameters lie on a mesh of all devices.

    Raises:
      UserError: there is no such reward, a file it needs is missing or wrong, or a user's own cannot be made.
    """
    scorers, mesh = scorers or ScorersConfig(), mesh or make_mesh(MeshConfig())
    if name in BUILT_IN:
        with under("scorers."):
            return CheckedReward(name, load_attribute(BUILT_IN[name], "reward")(scorers, mesh))
    if name in scorers.remote:
        make = load_attribute("egrpo_jax.rewards.remote.client:remote", "reward")
        with under(f"scorers.remote.{name}."):
            return CheckedReward(name, make(name, scorers.remote[name]))
    if ":" not in name:
        known = ", ".join([*BUILT_IN, *scorers.remote])
        raise UserError(
            f"unknown reward {name!r}; use one of {known}, give its server in config.scorers.remote, or "
            "module:attribute of your own"
        )
    return CheckedReward(name, _own(name), own=True)


def _own(name: str) -> Reward:
    """The attribute `name`, which is the reward itself or a class that makes it."""
    found = load_attribute(name, "reward")
    right = "it must be a function (images, prompts) -> scores, or a class of such, made without arguments"
    if isinstance(found, type):
        if not _takes(found, 0):
            raise UserError(f"the reward {name!r} is made with {inspect.signature(found)}; {right}")
        with blamed(name, found, own=True):
            found = found()
    if not callable(found):
        raise UserError(f"the reward {name!r} is {found!r}; {right}")
    if not _takes(found, 2):
        raise UserError(f"the reward {name!r} takes {inspect.signature(found)}; {right}")
    return found


def _takes(function: Any, count: int) -> bool:
    """Tells if `function` can be called with `count` arguments, as far as it tells."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # of some that are written in C
        return True
    return True
