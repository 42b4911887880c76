"""Rewards of the embedded emoji task: cosines under small image-text towers, and the judge's retrieval rank."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.errors import UserError
from egrpo_jax.data.emoji import all_names
from egrpo_jax.models.towers import Tower
from egrpo_jax.text.emoji_encoder import encode_prompts
from egrpo_jax.weights.assets import load_tower


class CosineReward:
    """Cosine in [-1, 1] between an image and its prompt under the embedded tower `name`.

    Texts are encoded once per distinct prompt and kept.
    """

    def __init__(self, name: str, folder: str | os.PathLike[str] | None = None):
        tower, self._params = load_tower(name, folder)
        self._score = jax.jit(lambda params, images, texts: (_encode(tower, params, images) * texts).sum(-1))
        self._encode_image = jax.jit(functools.partial(_encode, tower))
        self._encode_text = jax.jit(functools.partial(tower.apply, method="encode_text"))
        self._texts: dict[str, np.ndarray] = {}

    def __call__(self, images: chex.Array, prompts: Sequence[str]) -> chex.Array:
        """Scores `[B]` of `images [B, 32, 32, 3]` in [0, 1] for their `prompts`."""
        self.require(prompts, images.shape[1:3])
        new = sorted(set(prompts) - self._texts.keys())
        if new:
            vectors = self._encode_text({"params": self._params}, encode_prompts(new).pooled)
            self._texts |= zip(new, np.asarray(vectors), strict=True)
        return self._score(self._params, images, np.stack([self._texts[prompt] for prompt in prompts]))

    def require(self, prompts: Sequence[str], size: tuple[int, int]) -> None:
        """Raises UserError if images of `size` (H, W) are not the towers'; any prompt will do."""
        del prompts
        _require_size(size)

    def encode_images(self, images: chex.Array) -> chex.Array:
        """Features `[B, D]` of length 1 of `images [B, 32, 32, 3]` in [0, 1]."""
        return self._encode_image(self._params, images)


class RecallReward:
    """1 if an image's prompt is among the `top` names nearest to the image under a tower, else 0; the mean is R@top.

    Prompts must be names of emoji: what else is there to rank against them. An image that is nan scores nan.
    """

    def __init__(self, name: str, top: int, folder: str | os.PathLike[str] | None = None):
        tower, self._params = load_tower(name, folder)
        names = all_names()
        self._indices = {prompt: index for index, prompt in enumerate(names)}
        pooled = encode_prompts(names).pooled
        self._texts = tower.apply({"params": self._params}, pooled, method="encode_text")

        def score(params: chex.ArrayTree, texts: chex.Array, images: chex.Array, indices: chex.Array) -> chex.Array:
            cosines = _encode(tower, params, images) @ texts.T
            own = jnp.take_along_axis(cosines, indices[:, None], axis=1)
            hits = ((cosines > own).sum(-1) < top).astype(jnp.float32)
            return jnp.where(jnp.isnan(own[:, 0]), jnp.nan, hits)  # nothing is greater than nan: it would be a hit

        self._score = jax.jit(score)

    def __call__(self, images: chex.Array, prompts: Sequence[str]) -> chex.Array:
        """Hits `[B]`, 0 or 1, of `images [B, 32, 32, 3]` in [0, 1] for their `prompts`; raises as `require`."""
        self.require(prompts, images.shape[1:3])
        indices = np.array([self._indices[prompt] for prompt in prompts], np.int32)
        return self._score(self._params, self._texts, images, indices)

    def require(self, prompts: Sequence[str], size: tuple[int, int]) -> None:
        """Raises UserError if images of `size` (H, W) are not the tower's, or a prompt is no name of an emoji."""
        _require_size(size)
        unknown = [prompt for prompt in prompts if prompt not in self._indices]
        if unknown:
            raise UserError(
                f"expected names of emoji as prompts, which it ranks; {len(unknown)} of {len(prompts)} are none, the "
                f"first is {unknown[0]!r}"
            )


def cosine_to_reward(*_: object) -> CosineReward:
    """The reward to train on: robust against the errors a generator makes."""
    return CosineReward("reward")


def cosine_to_judge(*_: object) -> CosineReward:
    """The held-out judge: another architecture, other augmentation, another seed."""
    return CosineReward("judge")


def cosine_to_weak(*_: object) -> CosineReward:
    """A reward trained briefly on images with too little green, easily hacked; for studying reward hacking."""
    return CosineReward("weak")


def judge_recall_1(*_: object) -> RecallReward:
    """R@1 among all names under the judge."""
    return RecallReward("judge", 1)


def judge_recall_10(*_: object) -> RecallReward:
    """R@10 among all names under the judge."""
    return RecallReward("judge", 10)


def _encode(tower: Tower, params: chex.ArrayTree, images: chex.Array) -> chex.Array:
    return tower.apply({"params": params}, images, method="encode_images")


def _require_size(size: tuple[int, int]) -> None:
    if tuple(size) != (32, 32):
        raise UserError(f"expected images of 32 x 32 pixels, found {size[0]} x {size[1]}")
