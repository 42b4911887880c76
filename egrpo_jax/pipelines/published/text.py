"""Prompts to the conditioning of a published model, by the text encoders in its folder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from egrpo_jax.common.offload import on_device, on_host
from egrpo_jax.pipelines.families import Family, TextEncoder
from egrpo_jax.pipelines.published.loading import Params, load_text_encoder


class PromptTexts:
    """Encodes prompts by the text encoders of a pipeline, loaded at the first call on the mesh that is set.

    Attributes:
      settings: what determines the conditioning, as JSON values.
      always: prompts whose conditioning the model needs beside those that are asked for.
    """

    def __init__(
        self,
        family: Family,
        encoders: Mapping[str, TextEncoder],
        settings: Mapping[str, Any],
        always: Sequence[str] = (),
        offload: bool = False,
    ):
        """With `offload` the parameters rest in host memory between calls; they are stored as `settings["dtype"]`."""
        self.settings, self.always = settings, tuple(always)
        self._family, self._encoders, self._offload = family, encoders, offload
        self._loaded: dict[str, Callable[..., Any]] | None = None

    def __call__(self, prompts: Sequence[str]) -> Any:
        """The conditioning of `prompts`; each prompt's depends on it alone."""
        if self._loaded is None:
            mesh = jax.sharding.get_mesh()
            if mesh.empty:
                raise ValueError("no mesh to load text encoders on: call this within jax.set_mesh(mesh)")
            self._loaded = {name: self._load(name, encoder, mesh) for name, encoder in self._encoders.items()}
        tokens = {name: encoder.tokenize(prompts) for name, encoder in self._encoders.items()}
        features = {name: encode(*tokens[name]) for name, encode in self._loaded.items()}
        return self._family.text.join(features, tokens)

    def _load(self, name: str, encoder: TextEncoder, mesh: Mesh) -> Callable[..., Any]:
        dtype = self.settings["dtype"]
        params: Params = load_text_encoder(self._family, name, encoder, dtype, mesh)
        params = on_host(params) if self._offload else params
        module = encoder.module(jnp.dtype(dtype))
        apply = jax.jit(lambda params, *arguments: module.apply({"params": on_device(params)}, *arguments))
        return functools.partial(apply, params)
