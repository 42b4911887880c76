"""A flow model with all that turns prompts into images: what every program runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chex
import jax

from egrpo_jax.config import ConfigError
from egrpo_jax.data.emoji_text import encode_prompts
from egrpo_jax.errors import UserError
from egrpo_jax.flow.solver import VelocityFn
from egrpo_jax.models.flux import Flux
from egrpo_jax.models.patches import latents_to_pixels
from egrpo_jax.parallel.rules import Rules
from egrpo_jax.plugins import load_attribute
from egrpo_jax.trees import partition
from egrpo_jax.weights.assets import load_flow


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The config section `model`.

    Attributes:
      name: "emoji" for the embedded model, or "module:function" of your own; the function takes this section and
        returns a `Pipeline`.
      path: where the weights lie; None for those that come with the package.
    """

    name: str = "emoji"
    path: str | None = None


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Prompts to images.

    Attributes:
      velocity: `(params, latents[B, N, D], time[B], conditioning) -> velocity[B, N, D]`.
      params: of velocity and decoder, a pytree of arrays.
      encode: prompts to the conditioning, a pytree with leading axis B.
      decode: `(params, latents[B, N, D])`, the latents at t = 0, to images `[B, H, W, 3]` in [0, 1]; traceable.
      latents_shape: (N, D).
      rules: how the parameters are sharded; by default they are replicated.
      trainable: regular expression, found in the paths (joined with '/') of the parameters that training changes.
      forward_flops: floating-point operations of one sample's velocity, where known.
    """

    velocity: VelocityFn
    params: Any
    encode: Callable[[Sequence[str]], Any]
    decode: Callable[[Any, chex.Array], chex.Array]
    latents_shape: tuple[int, int]
    rules: Rules = ()
    trainable: str = ""
    forward_flops: float | None = None

    def __post_init__(self) -> None:
        if not jax.tree.leaves(partition(self.params, self.trainable)[0]):
            raise UserError(f"trainable {self.trainable!r} is found in no parameter's path, so nothing can be trained")


def load_pipeline(config: ModelConfig) -> Pipeline:
    """The pipeline that `config` names.

    Raises:
      UserError: it, or a file it needs, is not there.
    """
    if config.name == "emoji":
        return emoji_pipeline(config.path)
    if ":" not in config.name:
        raise ConfigError("model.name", config.name, "'emoji', or module:function of your own")
    pipeline = load_attribute(config.name, "config.model.name")(config)
    if not isinstance(pipeline, Pipeline):
        raise ConfigError(
            "model.name", config.name, f"a function that returns a Pipeline, not {type(pipeline).__name__}"
        )
    return pipeline


def emoji_pipeline(path: str | Path | None = None) -> Pipeline:
    """The embedded text-to-emoji model: a small FLUX on 32x32 pixels; `path` is another file of its weights."""
    flow = load_flow(path)
    model = Flux(flow.config)

    def velocity(params: Any, latents: chex.Array, time: chex.Array, text: Any) -> chex.Array:
        return model.apply({"params": params}, latents, time, text.states, text.pooled, grid=flow.grid)

    return Pipeline(
        velocity=velocity,
        params=jax.tree.map(jax.numpy.asarray, flow.params),
        encode=encode_prompts,
        decode=lambda _, latents: latents_to_pixels(latents, flow.grid, flow.patch),
        latents_shape=(flow.grid[0] * flow.grid[1], flow.config.in_channels),
    )
