"""Weights of a published model, given back in the forms in which others read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from egrpo_jax.common.atomic import check_new_folder, new_folder
from egrpo_jax.common.errors import ConfigError, UserError, last_cause
from egrpo_jax.models.lora import COLLECTION, merge_lora
from egrpo_jax.pipelines.base import Export, Writer
from egrpo_jax.pipelines.published.model import ORBAX, Model, pipeline_folder, read_model
from egrpo_jax.pipelines.published.options import PublishedOptions
from egrpo_jax.weights.export import export_folder
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.lora import FILE_NAME, save_lora


def to_diffusers(path: str, options: PublishedOptions, export: Export) -> Writer:
    """Writes a transformer folder of diffusers, adapters merged into the weights."""
    check_new_folder(export.out)
    model = read_model(pipeline_folder(path, text=False), options)
    return lambda params: _write_transformer(export.out, model, params, export.dtype)


def to_pipeline(path: str, options: PublishedOptions, export: Export) -> Writer:
    """Writes a pipeline folder like the base with another transformer."""
    check_new_folder(export.out)
    base = pipeline_folder(path, text=True)
    model = read_model(base, options)

    def write(params: Any) -> None:
        with new_folder(export.out) as folder:
            _write_transformer(folder / "transformer", model, params, export.dtype)
            for part in base.iterdir():
                if part.name != "transformer" and part.suffix != ".safetensors":
                    _take_over(part, folder / part.name, export.copy)

    return write


def to_peft(path: str, options: PublishedOptions, export: Export) -> Writer:
    """Writes the adapters that a run has trained, as `load_lora_weights` of diffusers' pipelines takes them.

    Raises:
      UserError: the model has none, they are not a run's, or the file is there already.
    """
    if options.lora is None:
        raise ConfigError("lora", None, "adapters, to be written as peft")
    if not export.of_run:
        raise UserError("peft is for the adapters of a training run: expected its --workdir")
    scale = options.lora.alpha / options.lora.rank
    model = read_model(pipeline_folder(path, text=False), options)
    layout = model.family.formats["diffusers"].layout(model.sizes)
    file = export.out if export.out.suffix == ".safetensors" else export.out / FILE_NAME
    if file.exists():
        raise UserError(f"{file} exists; name a new one, or remove it")
    return lambda params: save_lora(file, params[COLLECTION], scale, layout)


def to_orbax(path: str, options: PublishedOptions, export: Export) -> Writer:
    """Writes the transformer as the option `transformer` takes it, adapters merged into the weights."""
    check_new_folder(export.out)
    model = read_model(pipeline_folder(path, text=False), options)

    def write(params: Any) -> None:
        weights = jax.tree.map(lambda leaf: leaf.astype(export.dtype), _merged(model, params))
        with new_folder(export.out) as folder:
            (folder / "config.json").write_text(json.dumps(model.family.write_sizes(model.sizes), indent=2) + "\n")
            try:
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(folder.absolute() / ORBAX, weights)
            except ValueError as error:  # TensorStore's
                raise UserError(f"cannot write {export.out}: {last_cause(error)}") from error

    return write


EXPORTERS: Mapping[str, Callable[[str, PublishedOptions, Export], Writer]] = MappingProxyType(
    {"diffusers": to_diffusers, "pipeline": to_pipeline, "peft": to_peft, "orbax": to_orbax}
)


def _merged(model: Model, params: Any) -> Any:
    """The transformer's weights, adapters merged into them."""
    if model.lora is None:
        return params["flow"]
    return merge_lora(params["flow"], params[COLLECTION], model.lora.scale)


def _write_transformer(folder: Path, model: Model, params: Any, dtype: str) -> None:
    flow, layout = _merged(model, params), model.family.formats["diffusers"].layout(model.sizes)
    config = model.family.write_sizes(model.sizes)
    export_folder(folder, export_tensors(layout, flow), published_shapes(layout, flow), config, jnp.dtype(dtype))


def _take_over(part: Path, target: Path, copy: bool) -> None:
    if not copy:
        target.symlink_to(part.resolve())
    elif part.is_dir():
        shutil.copytree(part, target)
    else:
        shutil.copy(part, target)
