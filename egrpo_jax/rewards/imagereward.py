"""ImageReward v1.0: a BLIP trained on human rankings to say how well an image fits its prompt, arXiv:2304.05977."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from egrpo_jax.common.offload import on_host
from egrpo_jax.models.blip import Blip, BlipConfig
from egrpo_jax.parallel.rules import with_shardings
from egrpo_jax.rewards.batched import SCORER_RULES, Batched
from egrpo_jax.rewards.config import ScorersConfig
from egrpo_jax.rewards.preprocess import Preprocess
from egrpo_jax.text.wordpiece import Tokens, load_wordpiece
from egrpo_jax.weights.hub import resolve
from egrpo_jax.weights.load import load_params
from egrpo_jax.weights.pickles import open_pickle
from egrpo_jax.weights.published.blip import IGNORED, blip_layout

FILE = "ImageReward.pt"
TEXT_TOKENS = 35
"""Longer prompts are cut, as in training."""


class ImageReward:
    """Scores, about N(0, 1) over common images, of any size."""

    def __init__(self, network: Batched, tokenize: Callable[[Sequence[str]], Tokens]):
        """`network` takes images, token ids and the mask of padding."""
        self._network, self._tokenize = network, tokenize

    def __call__(self, images: chex.Array, prompts: Sequence[str]) -> chex.Array:
        """Scores `[B]` of `images [B, H, W, 3]` in [0, 1] for their `prompts`; nan where an image is not finite."""
        chex.assert_shape(images, (len(prompts), None, None, 3))
        # Words attend to the image in every layer: beside their ids nothing of a prompt can be kept for its group.
        return self._network(images, *self._tokenize(prompts))


def imagereward(scorers: ScorersConfig, mesh: Mesh, config: BlipConfig | None = None) -> ImageReward:
    """The reward from its published files; `config` are the sizes, by default the published ones.

    Raises:
      UserError: a file is missing or wrong.
    """
    config = config or BlipConfig()
    dtype = jnp.dtype(scorers.dtype)
    model, preprocess = Blip(config, dtype, dtype), Preprocess(config.image_size)
    vocabulary = resolve(scorers.imagereward.tokenizer, ["vocab.txt"])
    tokenize = load_wordpiece(vocabulary, TEXT_TOKENS, config.vocab_size)
    files = open_pickle(_file(scorers.imagereward.path))
    params = load_params(files, blip_layout(config), abstract_params(model, mesh), IGNORED)
    params = on_host(params) if scorers.offload else params

    def network(params: Any, images: chex.Array, ids: chex.Array, mask: chex.Array) -> chex.Array:
        return model.apply({"params": params}, preprocess(images), ids, mask)

    return ImageReward(Batched(network, params, scorers.batch, mesh), tokenize)


def _file(path: str | os.PathLike[str]) -> Path:
    found = resolve(path, [FILE])
    return found / FILE if found.is_dir() else found


def abstract_params(model: Blip, mesh: Mesh) -> dict[str, Any]:
    """The parameter tree as shapes, with their shardings."""
    size = model.config.image_size

    def init() -> Any:
        inputs = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
        return model.init(jax.random.key(0), *inputs)

    shapes = jax.eval_shape(init)["params"]
    return with_shardings(mesh, SCORER_RULES, shapes)
