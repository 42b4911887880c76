"""Prompts to images by the deterministic flow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.images import to_uint8
from egrpo_jax.flow.grid import Times
from egrpo_jax.flow.solver import solve
from egrpo_jax.parallel.mesh import DATA, REPLICATED, over_data, spread
from egrpo_jax.pipelines import Pipeline
from egrpo_jax.rl.rollout import anchor_noise, prompt_keys


class Sampler:
    """Prompts to images by the deterministic flow; runs under the mesh that is set."""

    def __init__(self, pipeline: Pipeline, times: Times, batch: int):
        """`batch` prompts at once, rounded up to a multiple of the mesh's axis `data`."""
        devices = jax.sharding.get_abstract_mesh().shape[DATA]
        self._pipeline, self._batch = pipeline, math.ceil(batch / devices) * devices

        def sample(params: Any, keys: jax.Array, conditioning: Any) -> jax.Array:
            noise = anchor_noise(keys, pipeline.latents_shape)
            latents = solve(pipeline.velocity, params, noise, jnp.array(times, jnp.float32), conditioning)
            return pipeline.decode(params, latents)

        self._sample = spread(sample, (REPLICATED, over_data(), over_data()), over_data())

    def __call__(self, params: Any, prompts: Sequence[str], key: jax.Array, first: int = 0) -> np.ndarray:
        """Images `[P, H, W, 3]` in [0, 1]. A prompt's noise depends on `key` and its place alone, from `first` on."""
        count = math.ceil(len(prompts) / self._batch)
        batches = self._batches(params, prompts, key, first)
        bar = tqdm(batches, "sample", count, unit="batch", leave=False, disable=None if count > 1 else True)
        return np.concatenate([images for _, images in bar])

    def batches(
        self, params: Any, prompts: Sequence[str], key: jax.Array, first: int = 0
    ) -> Iterator[tuple[int, np.ndarray]]:
        """The same images, a batch at a time, as uint8 `[B, H, W, 3]`, with the place of the first, from `first` on.

        Raises:
          UserError: an image is not finite, which uint8 cannot tell.
        """
        for place, images in self._batches(params, prompts, key, first):
            for prompt, image in zip(prompts[place - first :], images, strict=False):
                if not np.isfinite(image).all():
                    raise UserError(
                        f"the image of the prompt {prompt!r} is not finite: weights of the model or of its decoder may "
                        "be damaged, or overflow in the dtype that they are computed in"
                    )
            yield place, to_uint8(images)

    def _batches(
        self, params: Any, prompts: Sequence[str], key: jax.Array, first: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(prompts), self._batch):
            part = list(prompts[start : start + self._batch])
            # One shape for all batches: the last one is filled up, and cut off again.
            filled = part + part[-1:] * (self._batch - len(part))
            keys = prompt_keys(key, first + start, self._batch)
            images = self._sample(params, keys, self._pipeline.encode(filled))
            yield first + start, np.asarray(images)[: len(part)]
