"""FLUX.1 as it is published, a folder with transformer, VAE, text encoders and tokenizers, described but not read."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.data.embeddings import EmbeddingStore
from egrpo_jax.models.attention import NEEDS, takes
from egrpo_jax.models.flux import Flux, FluxConfig, forward_flops
from egrpo_jax.models.lora import COLLECTION, apply_lora
from egrpo_jax.models.vae import Vae, VaeConfig, decoder_flops, latents_to_images, micro_batched, tiled
from egrpo_jax.parallel import hosts
from egrpo_jax.pipelines.base import Pipeline
from egrpo_jax.pipelines.flux.loading import (
    abstract_params,
    pipeline_folder,
    published_shift,
    read_decoder_config,
    read_params,
    read_transformer_config,
    text_encoder_shapes,
)
from egrpo_jax.pipelines.flux.options import FluxOptions
from egrpo_jax.pipelines.flux.parts import check_parts
from egrpo_jax.pipelines.flux.rules import FLUX_RULES
from egrpo_jax.pipelines.flux.text import FluxText, text_encoder


def flux_pipeline(path: str, options: FluxOptions) -> Pipeline:
    """The FLUX.1 pipeline in the folder `path`, or with that name on the Hub.

    The parameters are {"flow": transformer, "vae": {"decoder": ...}}, and "lora" if adapters are trained. Of the
    weights nothing is read but adapters to start from, whose ranks are in their file.

    Raises:
      UserError: a config file is missing, damaged, or of another model.
      ConfigError: an option does not fit the folder.
    """
    folder = pipeline_folder(path, text=options.embeddings is None)
    config = read_transformer_config(folder / "transformer", options)
    check_parts(folder, config, options.text_tokens if options.embeddings is None else None)
    vae_config = read_decoder_config(folder / "vae")
    store = None if options.embeddings is None else _open_store(options, config)
    pipeline = _describe(options, config, vae_config)
    return dataclasses.replace(
        pipeline,
        read=functools.partial(read_params, folder, options, config, vae_config),
        encode=text_encoder(folder, options) if store is None else _stored(store),
        sampling_shift=published_shift(folder / "scheduler", pipeline.latents_shape[0]),
        known_prompts=store,
    )


def flux_sketch(path: str, options: FluxOptions) -> Pipeline:
    """The FLUX.1 pipeline in the folder `path`, or of the published sizes: of FLUX.1-schnell where it has this name,
    else of FLUX.1-dev. Of files only configs are read, where the folder is there.

    Raises:
      UserError: a config file is damaged, or of another model.
    """
    folder = Path(path)
    options = dataclasses.replace(options, lora_weights=None)  # adapters of the ranks in the config
    if not folder.is_dir():
        return _describe(options, FluxConfig(guidance_embed="schnell" not in path.lower()), VaeConfig())
    transformer = read_transformer_config(folder / "transformer", options)
    return _describe(options, transformer, read_decoder_config(folder / "vae"))


def _describe(options: FluxOptions, config: FluxConfig, vae_config: VaeConfig) -> Pipeline:
    """All of a pipeline that follows from sizes; its `read` and `encode` raise UserError.

    Raises:
      ConfigError: an option does not fit the sizes or the devices.
    """
    grid = token_grid(options, vae_config)
    _check_attention(options, config, grid)
    dtype = jnp.dtype(options.dtype)
    flops = forward_flops(config, grid[0] * grid[1], options.text_tokens)
    # Gradients of activations and of weights are a forward pass's work each; the base of adapters needs but the first.
    passes = 1 + (1 if options.lora else 2) + (options.remat == "blocks")
    model = Flux(config, dtype, remat=options.remat, attention=options.attention)
    return Pipeline(
        velocity=functools.partial(_velocity, model, options, grid),
        abstract_params=abstract_params(options, config, vae_config),
        read=_no_files,
        encode=_no_files,
        decode=functools.partial(_decode, Vae(vae_config, jnp.dtype(options.decode_dtype)), options, grid),
        latents_shape=(grid[0] * grid[1], config.in_channels),
        rules=FLUX_RULES,
        dtype=dtype,
        trainable=f"^{COLLECTION}/" if options.lora else "^flow/",
        conditioning=FluxText(
            jax.ShapeDtypeStruct((options.text_tokens, config.text_dim), dtype),
            jax.ShapeDtypeStruct((config.pooled_dim,), dtype),
        ),
        encoder_params={} if options.embeddings or options.offload_encoders else text_encoder_shapes(options.dtype),
        forward_flops=flops,
        decode_flops=decoder_flops(vae_config, 2 * grid[0], 2 * grid[1]),
        training_flops=passes * flops,
        about=_about(options, config),
    )


def _no_files(_: Any) -> Any:
    raise UserError("a model that is described by its sizes alone has no weights and no text encoders")


def _about(options: FluxOptions, config: FluxConfig) -> dict[str, Any]:
    guidance = {"guidance": options.guidance} if config.guidance_embed else {}
    base = {"transformer": options.transformer, "int8_base": options.int8_base or None}
    return base | {"lora_weights": options.lora_weights} | guidance


def token_grid(options: FluxOptions, vae: VaeConfig) -> tuple[int, int]:
    """Rows and columns of image tokens."""
    return options.height // (2 * vae.stride), options.width // (2 * vae.stride)


def _check_attention(options: FluxOptions, config: FluxConfig, grid: tuple[int, int]) -> None:
    """Raises ConfigError for a kernel that does not run on the devices here."""
    tokens = options.text_tokens + grid[0] * grid[1]
    query = jax.ShapeDtypeStruct((1, tokens, config.num_heads, config.head_dim), jnp.dtype(options.dtype))
    if not takes(options.attention, query):
        needs = f"'auto' or 'xla', or for {options.attention!r} {NEEDS[options.attention]}"
        raise ConfigError("attention", options.attention, needs)


def _velocity(
    model: Flux,
    options: FluxOptions,
    grid: tuple[int, int],
    params: Any,
    latents: chex.Array,
    time: chex.Array,
    conditioning: FluxText,
) -> chex.Array:
    if options.truncate_time:
        time = jnp.floor(time * 1000) / 1000
    guidance = jnp.full(time.shape, options.guidance) if model.config.guidance_embed else None
    inputs = (latents, time, conditioning.text, conditioning.pooled, guidance)
    if options.lora is None:
        return model.apply({"params": params["flow"]}, *inputs, grid=grid)
    variables = {"params": params["flow"], COLLECTION: params[COLLECTION]}
    return apply_lora(model, variables, *inputs, grid=grid, scale=options.lora.scale)


def _decode(vae: Vae, options: FluxOptions, grid: tuple[int, int], params: Any, latents: chex.Array) -> chex.Array:
    decode = lambda z: vae.apply({"params": params["vae"]}, z, method="decode")
    if options.decode_tile is not None:
        decode = tiled(decode, options.decode_tile)
    return latents_to_images(micro_batched(decode, options.decode_batch), latents, grid, vae.config)


def _open_store(options: FluxOptions, config: FluxConfig) -> EmbeddingStore:
    assert options.embeddings is not None
    store = EmbeddingStore(options.embeddings)
    wanted = {"text_tokens": options.text_tokens, "text_dim": config.text_dim, "pooled_dim": config.pooled_dim}
    found = {key: store.settings.get(key) for key in wanted}
    if found != wanted:
        raise ConfigError("embeddings", options.embeddings, f"a folder made with {wanted}; that was made with {found}")
    return store


def _stored(store: EmbeddingStore) -> Any:
    return lambda prompts: FluxText(**hosts.read_rows(prompts, store.lookup))
