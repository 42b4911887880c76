"""FLUX.1 as it is published: a folder with transformer, VAE, text encoders and tokenizers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.data.embeddings import EmbeddingStore
from egrpo_jax.models.flux import Flux, FluxConfig, Remat, forward_flops
from egrpo_jax.models.lora import COLLECTION, LoraConfig, apply_lora, init_lora
from egrpo_jax.models.vae import Vae, VaeConfig, latents_to_images, micro_batched, tiled
from egrpo_jax.parallel.rules import FLUX_RULES
from egrpo_jax.pipelines.base import Pipeline
from egrpo_jax.pipelines.flux.files import (
    load_decoder,
    load_transformer,
    pipeline_folder,
    published_shift,
    read_transformer_config,
)
from egrpo_jax.pipelines.flux.parts import check_parts
from egrpo_jax.pipelines.flux.text import FluxText, FluxTextEncoder
from egrpo_jax.weights.lora import load_lora
from egrpo_jax.weights.published.flux import flux_layout

Dtype = Literal["bfloat16", "float32"]


@dataclasses.dataclass(frozen=True)
class FluxOptions:
    """The config section `model.flux`.

    Attributes:
      height, width: of the images, in pixels; multiples of 16.
      guidance: the distilled guidance scale, an input of FLUX.1-dev; FLUX.1-schnell has none.
      text_tokens: length of the T5 sequence; padding is attended to, so that it must be what the model was trained
        with: 512 (dev) or 256 (schnell).
      transformer: other weights for the transformer: a diffusers folder, a single file in the BFL layout, or what
        `convert --to orbax` wrote.
      embeddings: a folder that `encode` made; then no text encoder is loaded.
      lora: adapters to train; None trains all weights of the transformer.
      lora_weights: start from the adapters in this file of diffusers instead of fresh ones.
      dtype: what the models compute in.
      param_dtype: what the trained weights are stored in; weights that are not trained are stored in `dtype`.
      decode_dtype: what the VAE decoder computes and is stored in.
      decode_batch: images decoded at once on a device.
      decode_tile: decode in overlapping tiles of so many rows and columns of latents, for large images.
      remat: what the backward pass computes again instead of keeping it.
      truncate_time: cut the model's time input to thousandths, as the PyTorch trainers do.
    """

    height: int = 720
    width: int = 720
    guidance: float = 3.5
    text_tokens: int = 512
    transformer: str | None = None
    embeddings: str | None = None
    lora: LoraConfig | None = None
    lora_weights: str | None = None
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    decode_dtype: Dtype = "float32"
    decode_batch: int = 4
    decode_tile: int | None = None
    remat: Remat = "blocks"
    truncate_time: bool = False

    def __post_init__(self) -> None:
        for key in ("height", "width"):
            if getattr(self, key) < 16 or getattr(self, key) % 16:
                raise ConfigError(key, getattr(self, key), "a positive multiple of 16")
        for key in ("text_tokens", "decode_batch"):
            if getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "at least 1")
        if self.lora_weights is not None and self.lora is None:
            raise ConfigError("lora_weights", self.lora_weights, "model.flux.lora to be set too, with rank and alpha")
        if self.decode_tile is not None and (self.decode_tile < 4 or self.decode_tile % 4):
            raise ConfigError("decode_tile", self.decode_tile, "a positive multiple of 4, or None")


def flux_pipeline(path: str, options: FluxOptions, mesh: Mesh) -> Pipeline:
    """The FLUX.1 pipeline in the folder `path`, or with that name on the Hub; its parameters lie on `mesh`.

    The parameters are {"flow": transformer, "vae": {"decoder": ...}}, and "lora" if adapters are trained.

    Raises:
      UserError: a file is missing, damaged, or of another model.
    """
    folder = pipeline_folder(path, text=options.embeddings is None)
    sizes = read_transformer_config(folder / "transformer", options.transformer)
    check_parts(folder, sizes, options.text_tokens if options.embeddings is None else None)
    trained_dtype = options.dtype if options.lora else options.param_dtype
    config, flow = load_transformer(folder / "transformer", options.transformer, trained_dtype, mesh)
    vae_config, decoder = load_decoder(folder / "vae", options.decode_dtype, mesh)
    grid = token_grid(options, vae_config)
    params = {"flow": flow, "vae": {"decoder": decoder}}
    if options.lora:
        params[COLLECTION] = _adapters(options, options.lora, config, flow)
    store = None if options.embeddings is None else _open_store(options, config)
    return Pipeline(
        velocity=functools.partial(
            _velocity, Flux(config, jnp.dtype(options.dtype), remat=options.remat), options, grid
        ),
        params=params,
        encode=_stored(store)
        if store is not None
        else FluxTextEncoder(folder, options.text_tokens, options.dtype, mesh),
        decode=functools.partial(_decode, Vae(vae_config, jnp.dtype(options.decode_dtype)), options, grid),
        latents_shape=(grid[0] * grid[1], config.in_channels),
        rules=FLUX_RULES,
        trainable=f"^{COLLECTION}/" if options.lora else "^flow/",
        forward_flops=forward_flops(config, grid[0] * grid[1], options.text_tokens),
        sampling_shift=published_shift(folder / "scheduler", grid[0] * grid[1]),
        known_prompts=store,
    )


def _adapters(options: FluxOptions, lora: LoraConfig, config: FluxConfig, flow: Any) -> Any:
    if options.lora_weights is not None:
        return load_lora(options.lora_weights, lora.scale, flux_layout(config, "diffusers"), flow)
    return init_lora(jax.random.key(0), flow, lora)  # a fixed key: B is zero, so that every start is the base model


def token_grid(options: FluxOptions, vae: VaeConfig) -> tuple[int, int]:
    """Rows and columns of image tokens."""
    return options.height // (2 * vae.stride), options.width // (2 * vae.stride)


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
        raise UserError(f"config.model.flux.embeddings: {options.embeddings} was made with {found}, expected {wanted}")
    return store


def _stored(store: EmbeddingStore) -> Any:
    return lambda prompts: FluxText(**store.lookup(prompts))
