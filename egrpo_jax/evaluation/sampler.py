"""Prompts to images by the deterministic flow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.images import finite_images, to_uint8
from egrpo_jax.flow.grid import Times
from egrpo_jax.flow.solver import SOLVERS, solve
from egrpo_jax.parallel import hosts
from egrpo_jax.parallel.fsdp import Layout
from egrpo_jax.parallel.mesh import compiled, over_samples, sample_devices, spread
from egrpo_jax.pipelines import Pipeline
from egrpo_jax.rl.transitions import initial_noise, prompt_keys


class Sampler:
    """Prompts to images by the deterministic flow; runs under the mesh that is set."""

    def __init__(self, pipeline: Pipeline, times: Times, batch: int, solver: str = "euler"):
        """`batch` prompts at once, rounded up to a multiple of the devices; `solver`: of `flow.solver.SOLVERS`."""
        devices = sample_devices()
        self._pipeline, self._batch = pipeline, math.ceil(batch / devices) * devices
        layout = Layout.of(pipeline.abstract(jax.sharding.get_mesh()), pipeline.dtype)

        def sample(params: Any, keys: jax.Array, conditioning: Any) -> jax.Array:
            noise, boxed = initial_noise(keys, pipeline.latents_shape), layout.boxed(params)
            latents = solve(SOLVERS[solver](len(times) - 1), pipeline.velocity, boxed, noise, times, conditioning)
            return pipeline.decode(boxed, latents)

        spread_out = spread(sample, (layout.specs, over_samples(), over_samples()), over_samples())
        self._sample = compiled(lambda params, *inputs: spread_out(layout.working_copy(params), *inputs))

    def __call__(
        self, params: Any, prompts: Sequence[str], key: jax.Array, first: int = 0
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Batches of images `[B, H, W, 3]` in [0, 1], each with the index of its first one, in a process that is alone;
        see `own`."""
        for places, images in self.own(params, prompts, key, first):
            yield int(places[0]), images

    def own(
        self, params: Any, prompts: Sequence[str], key: jax.Array, first: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """This process's images `[B, H, W, 3]` in [0, 1] of each batch, and their indices `[B]`.

        A prompt's noise depends on `key` and its index alone, which is counted from `first` on.

        Raises:
          UserError: no image of a batch is finite.
        """
        for start in range(0, len(prompts), self._batch):
            part = list(prompts[start : start + self._batch])
            # One shape for all batches: the last one is filled up, and cut off again.
            filled = part + part[-1:] * (self._batch - len(part))
            keys = prompt_keys(key, first + start, self._batch)
            rows, own = hosts.own_rows(self._sample(params, keys, self._pipeline.encode(filled)))
            rows = rows[rows < len(part)]
            images = np.asarray(own)[: len(rows)]
            if not hosts.largest(int(finite_images(images).any())):
                raise _not_finite(part[0])
            yield first + start + rows, images


def pixels(images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """`images [B, H, W, 3]` of `prompts` as uint8. Raises UserError if one is not finite, which uint8 cannot tell."""
    for prompt, finite in zip(prompts, finite_images(images), strict=True):
        if not finite:
            raise _not_finite(prompt)
    return to_uint8(images)


def _not_finite(prompt: str) -> UserError:
    return UserError(
        f"the image of the prompt {prompt!r} is not finite: weights of the model or of its decoder may be damaged, or "
        "overflow in the dtype that they are computed in"
    )
