"""The sources of models, and what programs ask of the one that a config names."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import field
from typing import Any

from egrpo_jax.common.errors import ConfigError, under
from egrpo_jax.common.plugins import load_attribute
from egrpo_jax.pipelines.base import Export, Pipeline, PromptEncoder, Source, Writer
from egrpo_jax.pipelines.emoji import EMOJI
from egrpo_jax.pipelines.published import PUBLISHED, PublishedOptions

SOURCES: dict[str, Source] = {source.name: source for source in (EMOJI, PUBLISHED)}
EXPORTS = sorted({form for source in SOURCES.values() for form in source.exporters})
"""All forms in which weights are given back."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The config section `model`; a source with options has a field of its name.

    Attributes:
      name: "emoji" for the embedded model, "published" for a flow model as diffusers keeps it, FLUX.1 say, or
        "module:function" of your own; the function takes this section and returns a `Pipeline`.
      path: where the weights lie: for "emoji" a file, None being the one that comes with the package; for "published"
        the folder of a pipeline, or its name on the Hub, `org/name`; its own config tells which family it is of.
      published: more about "published".
    """

    name: str = "emoji"
    path: str | None = None
    published: PublishedOptions = field(default_factory=PublishedOptions)


def load_pipeline(config: ModelConfig) -> Pipeline:
    """The pipeline that `config` names; its weights are not read before its `load`.

    Raises:
      UserError: it, or a file it needs, is not there.
    """
    if config.name in SOURCES:
        source = SOURCES[config.name]
        with _arguments(config, source) as (path, options):
            return source.pipeline(path, options)
    return _own(config)


def sketch_pipeline(config: ModelConfig) -> Pipeline:
    """The pipeline that `config` names, of the published sizes where its files are not on this machine.

    Raises:
      UserError: as `load_pipeline`, or a pipeline of one's own does not describe its `conditioning`.
    """
    if config.name in SOURCES:
        source = SOURCES[config.name]
        with _arguments(config, source) as (path, options):
            return (source.sketch or source.pipeline)(path, options)
    pipeline = _own(config)
    if pipeline.conditioning is None:
        raise ConfigError("model.name", config.name, "a function whose Pipeline has its field `conditioning` set")
    return pipeline


def lighter_options(config: ModelConfig) -> list[dict[str, Any]]:
    """Sets of options of the model that `config` names, by their keys, with each of which a run takes less memory."""
    source = SOURCES.get(config.name)
    sets = source.lighter(getattr(config, source.name, None)) if source else ()
    return [{f"model.{config.name}.{name}": value for name, value in options.items()} for options in sets]


def exact_model(config: ModelConfig) -> ModelConfig:
    """`config` with its base as it was published: what weights that are given back are made from."""
    source = SOURCES.get(config.name)
    if source is None or not source.exact:
        return config
    options = dataclasses.replace(getattr(config, source.name), **source.exact)
    return dataclasses.replace(config, **{source.name: options})


def _own(config: ModelConfig) -> Pipeline:
    """The pipeline that a function of the user's own returns."""
    if ":" not in config.name:
        raise ConfigError("model.name", config.name, f"{_names(SOURCES)}, or module:function of your own")
    pipeline = load_attribute(config.name, "config.model.name")(config)
    if not isinstance(pipeline, Pipeline):
        expected = f"a function that returns a Pipeline, not {type(pipeline).__name__}"
        raise ConfigError("model.name", config.name, expected)
    return pipeline


def load_encoder(config: ModelConfig) -> PromptEncoder:
    """The text encoders of the model that `config` names.

    Raises:
      UserError: it has none whose embeddings can be stored, or a file is not there.
    """
    able = {name: source.encoder for name, source in SOURCES.items() if source.encoder is not None}
    if config.name not in able:
        raise ConfigError("model.name", config.name, f"{_names(able)}, whose embeddings can be stored")
    with _arguments(config, SOURCES[config.name]) as (path, options):
        return able[config.name](path, options)


def load_writer(config: ModelConfig, form: str, export: Export) -> Writer:
    """The function that writes parameters of the model that `config` names in the form `form`, one of `EXPORTS`.

    Raises:
      UserError: the model is not given back in that form, or what `export` asks for cannot be done.
    """
    able = [name for name, source in SOURCES.items() if form in source.exporters]
    if config.name not in able:
        raise ConfigError("model.name", config.name, f"{_names(able)}, to be written as {form}")
    source = SOURCES[config.name]
    with _arguments(config, source) as (path, options):
        return source.exporters[form](path, options, export)


@contextlib.contextmanager
def _arguments(config: ModelConfig, source: Source) -> Iterator[tuple[str | None, Any]]:
    """The path and options that a source's functions take; completes the keys of the ConfigErrors that they raise."""
    if config.path is None and source.path is not None:
        raise ConfigError("model.path", None, source.path)
    with under(f"model.{source.name}."):
        yield config.path, getattr(config, source.name, None)


def _names(sources: Iterable[str]) -> str:
    return ", ".join(map(repr, sources))
