"""The pipeline that a config names."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import field

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.plugins import load_attribute
from egrpo_jax.pipelines.base import Pipeline
from egrpo_jax.pipelines.emoji import emoji_pipeline
from egrpo_jax.pipelines.flux.options import FluxOptions
from egrpo_jax.pipelines.flux.spec import flux_pipeline


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


def load_pipeline(config: ModelConfig) -> Pipeline:
    """The pipeline that `config` names; its weights are not read before its `load`.

    Raises:
      UserError: it, or a file it needs, is not there.
    """
    if config.name == "emoji":
        return emoji_pipeline(config.path)
    if config.name == "flux":
        if config.path is None:
            raise ConfigError("model.path", None, "the folder of a FLUX.1 pipeline, or its name on the Hub, org/name")
        with _under("model.flux."):
            return flux_pipeline(config.path, config.flux)
    if ":" not in config.name:
        raise ConfigError("model.name", config.name, "'emoji', 'flux', or module:function of your own")
    pipeline = load_attribute(config.name, "config.model.name")(config)
    if not isinstance(pipeline, Pipeline):
        raise ConfigError(
            "model.name", config.name, f"a function that returns a Pipeline, not {type(pipeline).__name__}"
        )
    return pipeline


@contextlib.contextmanager
def _under(section: str) -> Iterator[None]:
    """Puts `section` before the key of a ConfigError: who reads a section does not know where it stands."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(section + error.key, error.found, error.expected) from None
