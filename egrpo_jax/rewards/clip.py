"""Scores under CLIPs: how well an image fits its prompt, for four of them, and how it looks, for one.

| reward | score | model |
|---|---|---|
| `hpsv2.1`, `hpsv2.0` | cosine | HPSv2 (Wu et al., 2023, arXiv:2306.09341) |
| `clip_score` | cosine | any CLIP |
| `pickscore` | cosine times exp(logit_scale), about 100 | PickScore (Kirstain et al., 2023, arXiv:2305.01569) |
| `aesthetic` | a mark, about 1 to 10 | LAION's predictor v2 on CLIP ViT-L/14 |

Others report the same numbers by other conventions: HPSv2 times 100, the CLIP score times 100 or 2.5, PickScore over
100 or over 26.
"""

from __future__ import annotations

import collections
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.offload import on_device, on_host
from egrpo_jax.models.clip import ClipConfig, LinearHead
from egrpo_jax.parallel.rules import with_shardings
from egrpo_jax.rewards.batched import Batched
from egrpo_jax.rewards.clip_files import (
    LoadedClip,
    load_clip,
    load_hps,
    load_transformers_clip,
    open_weights,
)
from egrpo_jax.rewards.config import ScorersConfig
from egrpo_jax.rewards.preprocess import Preprocess
from egrpo_jax.weights.layout import Layout, Params, linear
from egrpo_jax.weights.load import load_params

TEXTS_AT_ONCE = 8
TEXTS_KEPT = 4096

AESTHETIC_HEAD = ((0, 1024), (2, 128), (4, 64), (6, 16), (7, 1))
"""Number and width of the linear layers of LAION's head; those between are dropout."""


class ImageFeatures:
    """Unit vectors `[B, D]` of `images [B, H, W, 3]` in [0, 1] under a CLIP; nan where an image is not finite."""

    def __init__(self, clip: LoadedClip, batch: int, mesh: Mesh):
        """`batch` images at once on a device."""
        model, preprocess = clip.model, clip.preprocess

        def network(params: Params, images: chex.Array) -> chex.Array:
            return model.apply({"params": params}, preprocess(images), method="encode_images")

        # Where nothing else holds the text tower, its memory is free.
        params = _without(clip.params, "text", "text_projection")
        self._network = Batched(network, params, batch, mesh)

    def __call__(self, images: chex.Array) -> chex.Array:
        return self._network(images)


class TextFeatures:
    """Unit vectors of prompts, `[B, D]`, each computed once and kept while it is among those asked for last."""

    def __init__(self, encode: Callable[[Sequence[str]], np.ndarray], kept: int = TEXTS_KEPT):
        """`encode` gives the vectors of `TEXTS_AT_ONCE` texts; `kept` is how many vectors are kept between calls."""
        self._encode, self._kept = encode, kept
        self._vectors: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._vectors]
        for first in range(0, len(new), TEXTS_AT_ONCE):
            texts = new[first : first + TEXTS_AT_ONCE]
            filled = texts + [""] * (TEXTS_AT_ONCE - len(texts))  # always as many: compiled once
            self._vectors.update(zip(texts, self._encode(filled), strict=False))
        for prompt in prompts:
            self._vectors.move_to_end(prompt)
        vectors = np.stack([self._vectors[prompt] for prompt in prompts])
        while len(self._vectors) > self._kept:
            self._vectors.popitem(last=False)
        return vectors


class ClipReward:
    """Cosine of an image and its prompt under a CLIP, times `scale`."""

    def __init__(self, clip: LoadedClip, batch: int, mesh: Mesh, scale: float = 1.0):
        self.encode_images = ImageFeatures(clip, batch, mesh)
        encode = functools.partial(clip.model.apply, method="encode_text")
        run = jax.jit(lambda params, ids: encode({"params": on_device(params)}, ids))
        params = _without(clip.params, "vision", "image_projection")
        self._texts = TextFeatures(lambda texts: np.asarray(run(params, clip.tokenize(texts))))
        self._score = jax.jit(lambda images, texts: scale * (images * texts).sum(-1))

    def __call__(self, images: chex.Array, prompts: Sequence[str]) -> chex.Array:
        """Scores `[B]` of `images [B, H, W, 3]` in [0, 1] for their `prompts`; nan where an image is not finite."""
        chex.assert_shape(images, (len(prompts), None, None, 3))
        return self._score(self.encode_images(images), self._texts(prompts))


class AestheticReward:
    """A mark for the look of an image, about 1 to 10, whatever its prompt."""

    def __init__(self, clip: LoadedClip, head_params: Params, batch: int, mesh: Mesh):
        self.encode_images = ImageFeatures(clip, batch, mesh)
        mark = jax.jit(_head().apply)
        self._score = lambda vectors: mark({"params": head_params}, vectors)[:, 0]

    def __call__(self, images: chex.Array, prompts: Sequence[str]) -> chex.Array:
        """Scores `[B]` of `images [B, H, W, 3]` in [0, 1]; nan where an image is not finite."""
        chex.assert_shape(images, (len(prompts), None, None, 3))
        return self._score(self.encode_images(images))


def _without(params: Params, *names: str) -> Params:
    return {name: leaves for name, leaves in params.items() if name not in names}


def hpsv2_1(scorers: ScorersConfig, mesh: Mesh, sizes: ClipConfig | None = None) -> ClipReward:
    """HPSv2.1, about 0.2 to 0.35; `sizes` are by default the published ones. Raises UserError: as `load_hps`."""
    return _hps("2.1", scorers, mesh, sizes)


def hpsv2_0(scorers: ScorersConfig, mesh: Mesh, sizes: ClipConfig | None = None) -> ClipReward:
    """HPSv2.0, whose scores are not those of 2.1. Raises UserError: as `load_hps`."""
    return _hps("2.0", scorers, mesh, sizes)


def _hps(version: str, scorers: ScorersConfig, mesh: Mesh, sizes: ClipConfig | None) -> ClipReward:
    path, tokenizer = scorers.hps.path, scorers.hps.tokenizer
    clip, found = load_hps(path, tokenizer, version, scorers.dtype, mesh, sizes or ClipConfig())
    if found not in (version, None):
        tqdm.tqdm.write(
            f"warning: the reward 'hpsv{version}' has in {path} a file of HPSv{found}, and scores of the two are not "
            f"comparable; use the reward 'hpsv{found}', or the file of HPSv{version}",
            file=sys.stderr,
        )
    return ClipReward(_resting(clip, scorers), scorers.batch, mesh)


def clip_score(scorers: ScorersConfig, mesh: Mesh) -> ClipReward:
    """The cosine itself, about 0.2 to 0.4. Raises UserError: as `load_clip`."""
    clip = load_clip(scorers.clip_score.path, scorers.dtype, mesh)
    return ClipReward(_resting(clip, scorers), scorers.batch, mesh)


def pickscore(scorers: ScorersConfig, mesh: Mesh) -> ClipReward:
    """PickScore as published, about 17 to 25. Raises UserError: as `load_transformers_clip`."""
    clip = load_transformers_clip(scorers.pickscore.path, scorers.dtype, mesh)
    scale = float(np.exp(np.asarray(clip.params["logit_scale"])))
    return ClipReward(_resting(clip, scorers), scorers.batch, mesh, scale)


def aesthetic(scorers: ScorersConfig, mesh: Mesh) -> AestheticReward:
    """LAION's aesthetic predictor v2. Raises UserError: as `load_clip`, or its own file is missing or wrong."""
    path = scorers.aesthetic.path
    if path is None or not Path(path).is_file():
        raise ConfigError("aesthetic.path", path, "the file sac+logos+ava1-l14-linearMSE.pth")
    clip = load_clip(scorers.aesthetic.clip, scorers.dtype, mesh)
    inputs = jax.ShapeDtypeStruct((1, clip.model.config.dim), jnp.float32)
    shapes = jax.eval_shape(_head().init, jax.random.key(0), inputs)["params"]
    params = load_params(open_weights(Path(path)), _head_layout(), with_shardings(mesh, (), shapes))
    # OpenAI's own, with which the head was trained, also where transformers publishes the model.
    clip = clip._replace(preprocess=Preprocess(clip.model.config.vision.image_size))
    return AestheticReward(_resting(clip, scorers), params, scorers.batch, mesh)


def _resting(clip: LoadedClip, scorers: ScorersConfig) -> LoadedClip:
    return clip._replace(params=on_host(clip.params)) if scorers.offload else clip


def _head() -> LinearHead:
    return LinearHead(tuple(width for _, width in AESTHETIC_HEAD))


def _head_layout() -> Layout:
    numbers = enumerate(number for number, _ in AESTHETIC_HEAD)
    return tuple(e for index, number in numbers for e in linear(f"layers.{number}", f"layer_{index}"))
