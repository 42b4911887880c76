"""Weights of FLUX.1, given back in the forms in which others read them."""

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
from egrpo_jax.models.flux import FluxConfig
from egrpo_jax.models.lora import COLLECTION, merge_lora
from egrpo_jax.pipelines.base import Export, Writer
from egrpo_jax.pipelines.flux.loading import ORBAX, pipeline_folder, read_transformer_config
from egrpo_jax.pipelines.flux.options import FluxOptions
from egrpo_jax.weights.export import export_folder
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.lora import FILE_NAME, save_lora
from egrpo_jax.weights.published.flux import config_to_diffusers, flux_layout


def to_diffusers(path: str, options: FluxOptions, export: Export) -> Writer:
    """Writes a transformer folder of diffusers, adapters merged into the weights."""
    check_new_folder(export.out)
    sizes = _sizes(pipeline_folder(path, text=False), options)
    return lambda params: _write_transformer(export.out, sizes, _merged(options, params), export.dtype)


def to_pipeline(path: str, options: FluxOptions, export: Export) -> Writer:
    """Writes a pipeline folder like the base with another transformer."""
    check_new_folder(export.out)
    base = pipeline_folder(path, text=True)
    sizes = _sizes(base, options)

    def write(params: Any) -> None:
        with new_folder(export.out) as folder:
            _write_transformer(folder / "transformer", sizes, _merged(options, params), export.dtype)
            for part in base.iterdir():
                if part.name != "transformer" and part.suffix != ".safetensors":
                    _take_over(part, folder / part.name, export.copy)

    return write


def to_peft(path: str, options: FluxOptions, export: Export) -> Writer:
    """Writes the adapters that a run has trained, as `FluxPipeline.load_lora_weights` takes them.

    Raises:
      UserError: the model has none, they are not a run's, or the file is there already.
    """
    if options.lora is None:
        raise ConfigError("lora", None, "adapters, to be written as peft")
    if not export.of_run:
        raise UserError("peft is for the adapters of a training run: expected its --workdir")
    scale = options.lora.scale
    layout = flux_layout(_sizes(pipeline_folder(path, text=False), options), "diffusers")
    file = export.out if export.out.suffix == ".safetensors" else export.out / FILE_NAME
    if file.exists():
        raise UserError(f"{file} exists; name a new one, or remove it")
    return lambda params: save_lora(file, params[COLLECTION], scale, layout)


def to_orbax(path: str, options: FluxOptions, export: Export) -> Writer:
    """Writes the transformer as the option `transformer` takes it, adapters merged into the weights."""
    check_new_folder(export.out)
    sizes = _sizes(pipeline_folder(path, text=False), options)

    def write(params: Any) -> None:
        weights = jax.tree.map(lambda leaf: leaf.astype(export.dtype), _merged(options, params))
        with new_folder(export.out) as folder:
            (folder / "config.json").write_text(json.dumps(config_to_diffusers(sizes), indent=2) + "\n")
            try:
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(folder.absolute() / ORBAX, weights)
            except ValueError as error:  # TensorStore's
                raise UserError(f"cannot write {export.out}: {last_cause(error)}") from error

    return write


EXPORTERS: Mapping[str, Callable[[str, FluxOptions, Export], Writer]] = MappingProxyType(
    {"diffusers": to_diffusers, "pipeline": to_pipeline, "peft": to_peft, "orbax": to_orbax}
)


def _sizes(base: Path, options: FluxOptions) -> FluxConfig:
    return read_transformer_config(base / "transformer", options)


def _merged(options: FluxOptions, params: Any) -> Any:
    """The transformer's weights, adapters merged into them."""
    if options.lora is None:
        return params["flow"]
    return merge_lora(params["flow"], params[COLLECTION], options.lora.scale)


def _write_transformer(folder: Path, sizes: FluxConfig, flow: Any, dtype: str) -> None:
    layout = flux_layout(sizes, "diffusers")
    shapes = published_shapes(layout, flow)
    export_folder(folder, export_tensors(layout, flow), shapes, config_to_diffusers(sizes), jnp.dtype(dtype))


def _take_over(part: Path, target: Path, copy: bool) -> None:
    if not copy:
        target.symlink_to(part.resolve())
    elif part.is_dir():
        shutil.copytree(part, target)
    else:
        shutil.copy(part, target)
