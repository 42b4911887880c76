"""Prompts to what FLUX.1 is conditioned on: T5's token states and CLIP's pooled vector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import numpy as np
from jax.sharding import Mesh

from egrpo_jax.common.offload import on_device, on_host
from egrpo_jax.pipelines.flux.loading import TextModels, load_text_models, pipeline_folder
from egrpo_jax.pipelines.flux.options import FluxOptions


class FluxText(NamedTuple):
    """The conditioning of B prompts: `text [B, L, text_dim]` and `pooled [B, pooled_dim]`."""

    text: chex.Array
    pooled: chex.Array


class FluxTextEncoder:
    """Encodes prompts by the text encoders of a pipeline's folder, loaded at the first call on the mesh that is set."""

    def __init__(self, folder: Path, text_tokens: int, dtype: str, offload: bool = False):
        """With `offload` the parameters rest in host memory between calls."""

        def load(mesh: Mesh) -> TextModels:
            models = load_text_models(folder, text_tokens, dtype, mesh)
            rest = on_host if offload else lambda params: params
            return models._replace(t5_params=rest(models.t5_params), clip_params=rest(models.clip_params))

        self._load = load
        self._models: TextModels | None = None

    @property
    def settings(self) -> dict[str, int | str]:
        """The settings that determine the embeddings, as JSON values."""
        models = self._loaded()
        return {
            "text_tokens": models.text_tokens,
            "text_dim": models.t5.config.width,
            "pooled_dim": models.clip.config.transformer.width,
            "dtype": str(np.dtype(models.t5.dtype)),
        }

    def __call__(self, prompts: Sequence[str]) -> FluxText:
        """The conditioning of `prompts`; each prompt's depends on it alone."""
        models = self._loaded()
        text = self._t5(models.t5_params, models.t5_tokenizer(prompts))
        return FluxText(text, self._clip(models.clip_params, models.clip_tokenizer(prompts)).pooled)

    def _loaded(self) -> TextModels:
        if self._models is None:
            mesh = jax.sharding.get_mesh()
            if mesh.empty:
                raise ValueError("no mesh to load text encoders on: call this within jax.set_mesh(mesh)")
            models = self._models = self._load(mesh)
            self._t5 = jax.jit(lambda params, ids: models.t5.apply({"params": on_device(params)}, ids))
            self._clip = jax.jit(lambda params, ids: models.clip.apply({"params": on_device(params)}, ids))
        return self._models


def flux_encoder(path: str, options: FluxOptions) -> FluxTextEncoder:
    """The text encoders of the FLUX.1 pipeline in the folder `path`, or with that name on the Hub."""
    return text_encoder(pipeline_folder(path, text=True), options)


def text_encoder(folder: Path, options: FluxOptions) -> FluxTextEncoder:
    """The text encoders of the pipeline in `folder`."""
    return FluxTextEncoder(folder, options.text_tokens, options.dtype, options.offload_encoders)
