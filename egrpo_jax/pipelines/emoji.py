"""The embedded text-to-emoji model: a small FLUX on 32x32 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.models.flux import Flux, forward_flops
from egrpo_jax.models.patches import latents_to_pixels
from egrpo_jax.models.text_encoder import TextFeatures
from egrpo_jax.pipelines.base import Pipeline, Source
from egrpo_jax.pipelines.families.flux import TRANSFORMER_RULES
from egrpo_jax.text.emoji import LENGTH
from egrpo_jax.text.emoji_encoder import encode_prompts
from egrpo_jax.weights.assets import load_asset, read_flow


def emoji_pipeline(path: str | Path | None = None) -> Pipeline:
    """The model that comes with the package; `path` is another file of its weights."""
    flow = read_flow(path)
    model = Flux(flow.config)
    tokens = flow.grid[0] * flow.grid[1]

    def velocity(params: Any, latents: chex.Array, time: chex.Array, text: Any) -> chex.Array:
        return model.apply({"params": params}, latents, time, text.states, text.pooled, grid=flow.grid)

    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    flops = forward_flops(flow.config, tokens, LENGTH)
    return Pipeline(
        velocity=velocity,
        abstract_params=flow.params,
        read=lambda _: load_asset(flow.path)[0],
        encode=encode_prompts,
        decode=lambda _, latents: latents_to_pixels(latents, flow.grid, flow.patch),
        latents_shape=(tokens, flow.config.in_channels),
        conditioning=TextFeatures(shape(LENGTH, flow.config.text_dim), shape(flow.config.pooled_dim)),
        rules=TRANSFORMER_RULES,
        forward_flops=flops,
        training_flops=3 * flops,
    )


EMOJI = Source("emoji", lambda path, _: emoji_pipeline(path))
