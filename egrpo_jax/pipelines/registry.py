"""The pipeline that a config names."""

from __future__ import annotations

import dataclasses
from dataclasses import field

from jax.sharding import Mesh

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.plugins import load_attribute
from egrpo_jax.parallel.rules import lay_out
from egrpo_jax.pipelines.base import Pipeline
from egrpo_jax.pipelines.emoji import emoji_pipeline
from egrpo_jax.pipelines.flux.pipeline import FluxOptions, flux_pipeline


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The config section `model`.

    Attributes:
      name: "emoji" for the embedded model, "flux" for FLUX.1, or "module:function" of your own; the function takes this
        section and returns a `Pipeline`.
      path: where the weights lie: for "emoji" a file, None being the one that comes with the package; for "flux" the
        folder of a published pipeline, or its name on the Hub, `org/name`.
      flux: more about "flux".
    """

    name: str = "emoji"
    path: str | None = None
    flux: FluxOptions = field(default_factory=FluxOptions)


def load_pipeline(config: ModelConfig, mesh: Mesh) -> Pipeline:
    """The pipeline that `config` names, its parameters on `mesh` as its rules say; large ones are read straight there.

    Raises:
      UserError: it, or a file it needs, is not there.
    """
    pipeline = _load(config, mesh)
    return dataclasses.replace(pipeline, params=lay_out(mesh, pipeline.rules, pipeline.params))


def _load(config: ModelConfig, mesh: Mesh) -> Pipeline:
    if config.name == "emoji":
        return emoji_pipeline(config.path)
    if config.name == "flux":
        if config.path is None:
            raise ConfigError("model.path", None, "the folder of a FLUX.1 pipeline, or its name on the Hub, org/name")
        return flux_pipeline(config.path, config.flux, mesh)
    if ":" not in config.name:
        raise ConfigError("model.name", config.name, "'emoji', 'flux', or module:function of your own")
    pipeline = load_attribute(config.name, "config.model.name")(config)
    if not isinstance(pipeline, Pipeline):
        raise ConfigError(
            "model.name", config.name, f"a function that returns a Pipeline, not {type(pipeline).__name__}"
        )
    return pipeline
