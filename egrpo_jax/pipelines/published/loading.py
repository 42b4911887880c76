"""The parameters of a published model: their shapes, and these, read from its folder to where they lie on a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.models.int8 import int8_kernels
from egrpo_jax.models.lora import COLLECTION, adapted_layers, init_lora
from egrpo_jax.models.vae import Vae, VaeConfig
from egrpo_jax.parallel.rules import with_shardings
from egrpo_jax.pipelines.families import Family, TextEncoder
from egrpo_jax.pipelines.guidance import NEGATIVE
from egrpo_jax.pipelines.published.model import ORBAX, Model
from egrpo_jax.weights.files import open_tensors
from egrpo_jax.weights.load import load_params
from egrpo_jax.weights.lora import linear_layers, load_lora
from egrpo_jax.weights.published import vae

Params = dict[str, Any]
Encode = Callable[[Sequence[str]], Any]


def abstract_params(model: Model) -> Params:
    """The transformer `flow`, the decoder in `vae`, adapters `lora`, if they are trained, and the conditioning of the
    `negative` prompt, if the model is guided away from it, in the types they have.

    Raises:
      UserError: the adapters to start from are not there, or of another model.
    """
    options = model.options
    flow = _cast(model.family.shapes(model.sizes), options.dtype if model.lora else options.param_dtype)
    params = {
        "flow": int8_kernels(flow, model.family.blocks) if options.int8_base else flow,
        "vae": _cast(decoder_shapes(model.vae), options.decode_dtype),
    }
    if model.lora is not None:
        params[COLLECTION] = jax.eval_shape(_adapters(model))
    if model.negatives:
        params[NEGATIVE] = model.conditioning._asdict()
    return params


def read_params(model: Model, folder: Path, encode: Encode, wanted: Params) -> Params:
    """The arrays of those parts that are in `wanted`, a part of `abstract_params` that says where each leaf lies; the
    conditioning of the negative prompt is what `encode` gives."""
    readers: dict[str, Callable[[Params], Params]] = {
        "flow": lambda part: load_transformer(model, folder / "transformer", part),
        "vae": lambda part: load_decoder(folder / "vae", model.vae, part),
        COLLECTION: lambda part: load_adapters(model, part),
        NEGATIVE: lambda part: _encoded(encode, model.options.negative, part),
    }
    return {name: readers[name](part) for name, part in wanted.items()}


def load_transformer(model: Model, folder: Path, abstract: Params) -> Params:
    """The transformer in `folder`, or the weights that the option `transformer` names."""
    source = folder if model.options.transformer is None else Path(model.options.transformer)
    if (source / ORBAX).is_dir():
        return _restore(source / ORBAX, abstract)
    files = open_tensors(source)
    found = model.family.format_of(files)
    return load_params(files, found.layout(model.sizes), abstract, found.ignored)


def load_adapters(model: Model, abstract: Params) -> Params:
    """Adapters from their file, in host memory, or fresh ones, made where they lie."""
    make = _adapters(model)
    if model.options.lora_weights is not None:
        return make()
    return jax.jit(make, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def _adapters(model: Model) -> Callable[[], Params]:
    flow, lora = model.family.shapes(model.sizes), model.lora
    assert lora is not None
    if model.options.lora_weights is not None:
        names = tuple(entry for form in model.family.formats.values() for entry in form.layout(model.sizes))
        return functools.partial(load_lora, model.options.lora_weights, lora.scale, names, flow)
    layers = adapted_layers(flow, lora.targets)
    if others := set(layers) - linear_layers(model.family.formats["diffusers"].layout(model.sizes)):
        expected = f"layers that are linear in the published model, unlike {', '.join(sorted(others))}"
        raise ConfigError("lora.targets", lora.targets, expected)
    return lambda: init_lora(jax.random.key(0), flow, lora)  # a fixed key: B is zero, so every start is the base model


def _encoded(encode: Encode, prompt: str, abstract: Params) -> Params:
    """The conditioning of `prompt` by its fields, without the leading axis; encoded on the mesh of `abstract`."""
    with jax.set_mesh(jax.tree.leaves(abstract)[0].sharding.mesh):
        first = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree))
        return first(encode([prompt]))._asdict()


def decoder_shapes(config: VaeConfig) -> Params:
    """The parameter tree of a VAE without its encoder, as shapes."""
    latents = jax.ShapeDtypeStruct((1, 2, 2, config.latent_channels), jnp.float32)
    return jax.eval_shape(lambda z: Vae(config).init(jax.random.key(0), z, method="decode"), latents)["params"]


def load_decoder(folder: Path, config: VaeConfig, abstract: Params) -> Params:
    """The decoder of the VAE in `folder`."""
    files = open_tensors(folder)
    fmt: vae.Format = "bfl" if any(name.startswith("decoder.up.") for name in files) else "diffusers"
    return load_params(files, vae.vae_layout(config, fmt), abstract, ignore=vae.IGNORED)


def text_encoder_shapes(model: Model) -> Params:
    """The parameters of the published text encoders, by name, as shapes."""
    dtype = model.options.dtype
    modules = model.family.text.modules(model.sizes)
    return {name: _text_shapes(make(jnp.dtype(dtype)), dtype) for name, make in modules.items()}


def load_text_encoder(family: Family, name: str, encoder: TextEncoder, dtype: str, mesh: Mesh) -> Params:
    """The parameters of the text encoder called `name`, in `dtype`, laid out by the rules of its family."""
    shapes = {name: _text_shapes(encoder.module(jnp.dtype(dtype)), dtype)}
    files = open_tensors(encoder.folder)
    return load_params(files, encoder.layout(files), with_shardings(mesh, family.rules, shapes)[name], encoder.ignored)


def _text_shapes(module: nn.Module, dtype: str) -> Params:
    init = lambda: module.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return _cast(jax.eval_shape(init), dtype)


def _cast(shapes: Params, dtype: str) -> Params:
    return jax.tree.map(lambda leaf: leaf.update(dtype=jnp.dtype(dtype)), shapes)


def _restore(folder: Path, abstract: Params) -> Params:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.absolute(), abstract)
