"""The parts of a published FLUX.1 folder: sizes and shapes, and the parameters, read to where they lie on a mesh."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.flow.grid import resolution_shift
from egrpo_jax.models.clip import ClipText, ClipTextConfig
from egrpo_jax.models.flux import Flux, FluxConfig
from egrpo_jax.models.int8 import int8_kernels
from egrpo_jax.models.lora import COLLECTION, LoraConfig, init_lora
from egrpo_jax.models.t5 import T5Config, T5Encoder
from egrpo_jax.models.vae import Vae, VaeConfig
from egrpo_jax.parallel.rules import with_shardings
from egrpo_jax.pipelines.flux.options import FluxOptions
from egrpo_jax.pipelines.flux.parts import read_text_parts
from egrpo_jax.pipelines.flux.rules import FLUX_RULES
from egrpo_jax.text.tokenizers import Tokenize
from egrpo_jax.weights.configs import read_config
from egrpo_jax.weights.files import open_tensors
from egrpo_jax.weights.hub import resolve
from egrpo_jax.weights.load import load_params
from egrpo_jax.weights.lora import load_lora
from egrpo_jax.weights.published import clip, flux, t5, vae
from egrpo_jax.weights.published.scheduler import read_scheduler

Params = dict[str, Any]

ORBAX = "orbax"
"""The folder inside what `convert --to orbax` writes."""
INT8 = r"^(double|single)_blocks/.*/kernel$"
"""The kernels that `int8_base` is about: 99.4 % of FLUX.1's weights."""


class TextModels(NamedTuple):
    """Text encoders with their parameters and tokenizers."""

    t5: T5Encoder
    t5_params: Params
    t5_tokenizer: Tokenize
    clip: ClipText
    clip_params: Params
    clip_tokenizer: Tokenize
    text_tokens: int


def pipeline_folder(path: str, text: bool) -> Path:
    """The local folder of the pipeline `path`; from the Hub without what is not needed, and text encoders if `text`."""
    parts = [
        "transformer",
        "vae",
        "scheduler",
        *(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2") * text),
    ]
    return resolve(path, ["model_index.json", "LICENSE*", *(f"{part}/*" for part in parts)])


def abstract_params(options: FluxOptions, config: FluxConfig, vae_config: VaeConfig) -> Params:
    """The transformer `flow`, the decoder in `vae` and, if they are trained, adapters `lora`, in the types they have.

    Raises:
      UserError: the adapters to start from are not there, or of another model.
    """
    flow = _cast(transformer_shapes(config), options.dtype if options.lora else options.param_dtype)
    params = {
        "flow": int8_kernels(flow, INT8) if options.int8_base else flow,
        "vae": _cast(decoder_shapes(vae_config), options.decode_dtype),
    }
    if options.lora is not None:
        params[COLLECTION] = jax.eval_shape(_adapters(options, options.lora, config))
    return params


def read_params(
    folder: Path, options: FluxOptions, config: FluxConfig, vae_config: VaeConfig, wanted: Params
) -> Params:
    """The arrays of those parts that are in `wanted`, a part of `abstract_params` that says where each leaf lies."""
    readers: dict[str, Callable[[Params], Params]] = {
        "flow": lambda part: load_transformer(folder / "transformer", options.transformer, config, part),
        "vae": lambda part: load_decoder(folder / "vae", vae_config, part),
        COLLECTION: lambda part: load_adapters(options, config, part),
    }
    return {name: readers[name](part) for name, part in wanted.items()}


def load_transformer(folder: Path, other: str | None, config: FluxConfig, abstract: Params) -> Params:
    """The transformer in a pipeline's `folder`, or the weights of the file or folder `other`."""
    source = folder if other is None else Path(other)
    if (source / ORBAX).is_dir():
        return _restore(source / ORBAX, abstract)
    files = open_tensors(source)
    fmt: flux.Format = "bfl" if any(name.startswith("double_blocks.") for name in files) else "diffusers"
    return load_params(files, flux.flux_layout(config, fmt), abstract)


def load_adapters(options: FluxOptions, config: FluxConfig, abstract: Params) -> Params:
    """Adapters from their file, in host memory, or fresh ones, made where they lie."""
    assert options.lora is not None
    make = _adapters(options, options.lora, config)
    if options.lora_weights is not None:
        return make()
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def _adapters(options: FluxOptions, lora: LoraConfig, config: FluxConfig) -> Callable[[], Params]:
    flow = transformer_shapes(config)
    if options.lora_weights is not None:
        names = flux.flux_layout(config, "diffusers") + flux.flux_layout(config, "bfl")
        return functools.partial(load_lora, options.lora_weights, lora.scale, names, flow)
    return lambda: init_lora(jax.random.key(0), flow, lora)  # a fixed key: B is zero, so every start is the base model


def read_transformer_config(folder: Path, options: FluxOptions) -> FluxConfig:
    """The sizes of the transformer in `folder`, or of another: a folder has its own, a file those of `folder`.

    Raises:
      ConfigError: the other is not there, or of a kind that cannot be stored as int8.
    """
    other = options.transformer
    source = folder if other is None else Path(other)
    if not source.exists() and other is not None:
        raise ConfigError("transformer", other, "an existing file or folder of weights")
    if options.int8_base and (source / ORBAX).is_dir():
        raise ConfigError("int8_base", True, f"a transformer in safetensors, not an Orbax checkpoint as in {source}")
    place = source if other is None or source.is_dir() else folder
    return flux.config_from_diffusers(read_config(place, flux.CLASS_NAME))


def transformer_shapes(config: FluxConfig) -> Params:
    """The parameter tree of a transformer, as shapes."""

    def init() -> Any:
        text, pooled = jnp.zeros((1, 1, config.text_dim)), jnp.zeros((1, config.pooled_dim))
        guidance = jnp.zeros(1) if config.guidance_embed else None
        latents = jnp.zeros((1, 1, config.in_channels))
        return Flux(config).init(jax.random.key(0), latents, jnp.zeros(1), text, pooled, guidance, grid=(1, 1))

    return jax.eval_shape(init)["params"]


def read_decoder_config(folder: Path) -> VaeConfig:
    """The sizes of the VAE in `folder`."""
    return vae.config_from_diffusers(read_config(folder, vae.CLASS_NAME))


def decoder_shapes(config: VaeConfig) -> Params:
    """The parameter tree of a VAE without its encoder, as shapes."""
    latents = jax.ShapeDtypeStruct((1, 2, 2, config.latent_channels), jnp.float32)
    return jax.eval_shape(lambda z: Vae(config).init(jax.random.key(0), z, method="decode"), latents)["params"]


def load_decoder(folder: Path, config: VaeConfig, abstract: Params) -> Params:
    """The decoder of the VAE in `folder`."""
    files = open_tensors(folder)
    fmt: vae.Format = "bfl" if any(name.startswith("decoder.up.") for name in files) else "diffusers"
    return load_params(files, vae.vae_layout(config, fmt), abstract, ignore=(r"encoder\..*",))


def published_shift(folder: Path, image_tokens: int) -> float:
    """The shift of the time grid on which the pipeline with the scheduler in `folder` samples images of this size."""
    keys = read_scheduler(folder)
    if not keys["use_dynamic_shifting"]:
        return keys["shift"]
    small, large = ((keys[f"{end}_image_seq_len"], keys[f"{end}_shift"]) for end in ("base", "max"))
    try:
        shift = resolution_shift(image_tokens, small, large)
    except OverflowError:
        shift = math.inf
    if keys["time_shift_type"] == "linear" and 0 < shift < math.inf:
        shift = math.log(shift)  # mu itself, not e^mu
    if not 0 < shift < math.inf:
        raise keys.error("max_shift", f"less extreme: {image_tokens} image tokens have a shift of {shift:g}")
    return shift


def text_encoder_shapes(dtype: str) -> Params:
    """The parameters of FLUX.1's text encoders as shapes: T5 XXL and the text tower of CLIP ViT-L/14."""
    t5_model, clip_model = T5Encoder(T5Config()), ClipText(ClipTextConfig())
    return {"t5": _cast(_token_model_shapes(t5_model), dtype), "clip": _cast(_token_model_shapes(clip_model), dtype)}


def load_text_models(folder: Path, text_tokens: int, dtype: str, mesh: Mesh) -> TextModels:
    """The text encoders of a pipeline's folder; T5 writes sequences of `text_tokens`."""
    parts = read_text_parts(folder, text_tokens)
    t5_model, t5_params = _load_t5(folder / "text_encoder_2", parts.t5, dtype, mesh)
    clip_model, clip_params = _load_clip(folder / "text_encoder", parts.clip, dtype, mesh)
    return TextModels(
        t5=t5_model,
        t5_params=t5_params,
        t5_tokenizer=parts.t5_tokenizer,
        clip=clip_model,
        clip_params=clip_params,
        clip_tokenizer=parts.clip_tokenizer,
        text_tokens=text_tokens,
    )


def _load_t5(folder: Path, config: T5Config, dtype: str, mesh: Mesh) -> tuple[T5Encoder, Params]:
    model = T5Encoder(config, jnp.dtype(dtype))
    abstract = _abstract(_token_model_shapes(model), "t5", dtype, mesh)
    return model, load_params(open_tensors(folder), t5.t5_layout(config), abstract, t5.IGNORED)


def _load_clip(folder: Path, config: ClipTextConfig, dtype: str, mesh: Mesh) -> tuple[ClipText, Params]:
    model, files = ClipText(config, jnp.dtype(dtype)), open_tensors(folder)
    abstract = _abstract(_token_model_shapes(model), "clip", dtype, mesh)
    return model, load_params(files, clip.clip_text_layout(config, clip.text_prefix(files)), abstract, clip.IGNORED)


def _token_model_shapes(model: ClipText | T5Encoder) -> Params:
    return jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]


def _abstract(shapes: Params, name: str, dtype: str, mesh: Mesh) -> Params:
    """`shapes` with the dtype wanted and the layout that the rules give a model called `name`."""
    return with_shardings(mesh, FLUX_RULES, {name: _cast(shapes, dtype)})[name]


def _cast(shapes: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(dtype)), shapes)


def _restore(folder: Path, abstract: Params) -> Params:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), abstract)
