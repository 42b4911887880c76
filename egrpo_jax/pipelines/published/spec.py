"""A model as it is published, a folder with transformer, VAE, text encoders and tokenizers, described but not read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax.numpy as jnp

from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.data.embeddings import EmbeddingStore
from egrpo_jax.flow.solver import VelocityFn
from egrpo_jax.models.lora import COLLECTION, apply_lora
from egrpo_jax.models.vae import Vae, decoder_flops, latents_to_images, micro_batched, tiled
from egrpo_jax.parallel import hosts
from egrpo_jax.pipelines.base import Pipeline
from egrpo_jax.pipelines.guidance import guided
from egrpo_jax.pipelines.published.loading import Encode, abstract_params, read_params, text_encoder_shapes
from egrpo_jax.pipelines.published.model import Model, pipeline_folder, read_model, sketch_model
from egrpo_jax.pipelines.published.options import PublishedOptions
from egrpo_jax.pipelines.published.text import PromptTexts
from egrpo_jax.weights.published.scheduler import read_scheduler


def published_pipeline(path: str, options: PublishedOptions) -> Pipeline:
    """The pipeline in the folder `path`, or with that name on the Hub.

    The parameters are {"flow": transformer, "vae": {"decoder": ...}}, "lora" if adapters are trained, and "negative" if
    it is guided away from a prompt. Of the weights nothing is read but adapters to start from, whose ranks are in their
    file.

    Raises:
      UserError: a config file is missing, damaged, or of another model.
      ConfigError: an option does not fit the folder.
    """
    folder = pipeline_folder(path, text=options.embeddings is None)
    model = read_model(folder, options)
    scheduler = read_scheduler(folder / "scheduler")
    store = None if options.embeddings is None else _open_store(options.embeddings, model)
    encode = prompt_texts(folder, model) if store is None else _stored(store, model)
    pipeline = _describe(model)
    return dataclasses.replace(
        pipeline,
        read=functools.partial(read_params, model, folder, encode),
        encode=encode,
        sampling_times=lambda steps: model.family.times(scheduler, pipeline.latents_shape[0], steps),
        known_prompts=store,
    )


def published_sketch(path: str, options: PublishedOptions) -> Pipeline:
    """The pipeline in the folder `path`, or the published one of that name. Of files only configs are read, where the
    folder is there.

    Raises:
      UserError: a config file is damaged, or of another model, or the name is not known.
    """
    # Adapters have the ranks that are in the config.
    return _describe(sketch_model(path, dataclasses.replace(options, lora_weights=None)))


def published_encoder(path: str, options: PublishedOptions) -> PromptTexts:
    """The text encoders of the pipeline in the folder `path`, or with that name on the Hub."""
    folder = pipeline_folder(path, text=True)
    return prompt_texts(folder, read_model(folder, options))


def prompt_texts(folder: Path, model: Model) -> PromptTexts:
    """The text encoders of the pipeline in `folder`."""
    encoders = model.family.text.read(folder, model.sizes, model.text_tokens)
    settings = model.text_settings | {"dtype": model.options.dtype}
    return PromptTexts(model.family, encoders, settings, model.negatives, model.options.offload_encoders)


def _describe(model: Model) -> Pipeline:
    """All of a pipeline that follows from sizes; its `read` and `encode` raise UserError.

    Raises:
      ConfigError: an option does not fit the sizes or the devices.
    """
    model.check()
    family, options = model.family, model.options
    passes = 1 + len(model.negatives)
    flops = passes * family.forward_flops(model.sizes, model.latents_shape[0], model.conditioning.text.shape[0])
    # Gradients of activations and of weights are a forward pass's work each; the base of adapters needs but the first.
    work = 1 + (1 if model.lora else 2) + (options.remat == "blocks")
    vae = Vae(model.vae, jnp.dtype(options.decode_dtype))
    return Pipeline(
        velocity=_velocity(model),
        abstract_params=abstract_params(model),
        read=_no_files,
        encode=_no_files,
        decode=functools.partial(_decode, vae, options, model.grid),
        latents_shape=model.latents_shape,
        rules=family.rules,
        dtype=jnp.dtype(options.dtype),
        trainable=model.trainable,
        conditioning=model.conditioning,
        encoder_params={} if options.embeddings or options.offload_encoders else text_encoder_shapes(model),
        passes=passes,
        forward_flops=flops,
        decode_flops=decoder_flops(model.vae, 2 * model.grid[0], 2 * model.grid[1]),
        training_flops=work * flops,
        about=_about(model),
    )


def _no_files(_: Any) -> Any:
    raise UserError("a model that is described by its sizes alone has no weights and no text encoders")


def _about(model: Model) -> dict[str, Any]:
    options = model.options
    about: dict[str, Any] = {
        "transformer": options.transformer,
        "int8_base": options.int8_base or None,
        "lora_weights": options.lora_weights,
    }
    if model.negatives or model.family.embeds_guidance(model.sizes):
        about["guidance"] = model.guidance
    if model.negatives:
        about["negative"] = options.negative
    return about


def _velocity(model: Model) -> VelocityFn:
    """The velocity of `model`, guided as it is."""
    options, family = model.options, model.family
    module = family.module(model.sizes, jnp.dtype(options.dtype), remat=options.remat, attention=options.attention)
    velocity = functools.partial(_apply, module, model)
    return velocity if model.guided_by is None else guided(velocity, model.guided_by)


def _apply(
    module: nn.Module, model: Model, params: Any, latents: chex.Array, time: chex.Array, conditioning: Any
) -> chex.Array:
    if model.options.truncate_time:
        time = jnp.floor(time * 1000) / 1000
    inputs = conditioning._asdict()
    if model.family.embeds_guidance(model.sizes):
        inputs["guidance"] = jnp.full(time.shape, model.guidance)
    if model.lora is None:
        return module.apply({"params": params["flow"]}, latents, time, **inputs, grid=model.grid)
    variables = {"params": params["flow"], COLLECTION: params[COLLECTION]}
    return apply_lora(module, variables, latents, time, **inputs, grid=model.grid, scale=model.lora.scale)


def _decode(vae: Vae, options: PublishedOptions, grid: tuple[int, int], params: Any, latents: chex.Array) -> chex.Array:
    apply = functools.partial(vae.apply, {"params": params["vae"]})
    decode = lambda z: apply(z, method="decode")
    if options.decode_tile is not None:
        decode = tiled(decode, options.decode_tile)
    return latents_to_images(micro_batched(decode, options.decode_batch), apply(latents, grid, method="unpack"))


def _open_store(folder: str, model: Model) -> EmbeddingStore:
    store, wanted = EmbeddingStore(folder), model.text_settings
    found = {key: store.settings.get(key) for key in wanted}
    if found != wanted:
        raise ConfigError("embeddings", folder, f"a folder made with {wanted}; that was made with {found}")
    missing = [negative for negative in model.negatives if negative not in store]
    if missing:
        raise ConfigError("embeddings", folder, f"a folder with the negative prompt {missing[0]!r}: encode anew")
    return store


def _stored(store: EmbeddingStore, model: Model) -> Encode:
    make = type(model.conditioning)

    def encode(prompts: Sequence[str]) -> Any:
        return make(**hosts.read_rows(prompts, store.lookup))

    return encode
