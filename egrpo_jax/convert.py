"""Weights from one form into another.

    python -m egrpo_jax.convert --workdir runs/flux_lora --to diffusers --out tuned

Takes the weights of the config, or with --workdir those of a training run (their average where one is kept), to

  diffusers  a transformer folder: config.json and safetensors, adapters merged into the weights;
  pipeline   a whole pipeline folder: that transformer, all else linked or copied (--rest) from the base;
  peft       the adapters alone, as `FluxPipeline.load_lora_weights` takes them;
  orbax      the transformer as an Orbax checkpoint, for --config.model.flux.transformer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import flags

from egrpo_jax import cli
from egrpo_jax.cli.model import ModelFlags
from egrpo_jax.common.atomic import new_folder
from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.models.flux import FluxConfig
from egrpo_jax.models.lora import COLLECTION, merge_lora
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.pipelines import load_pipeline
from egrpo_jax.pipelines.flux.loading import ORBAX, pipeline_folder, read_transformer_config
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.state import restore_params
from egrpo_jax.weights.export import export_folder
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.lora import FILE_NAME, save_lora
from egrpo_jax.weights.published.flux import config_to_diffusers, flux_layout

FLAGS = flags.FlagValues()
MODEL = ModelFlags(FLAGS)
TO = flags.DEFINE_enum(
    "to", None, ["diffusers", "pipeline", "peft", "orbax"], "What to write.", required=True, flag_values=FLAGS
)
OUT = flags.DEFINE_string(
    "out", None, "New folder, or for peft a file or folder, to write.", required=True, flag_values=FLAGS
)
DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of the weights in the files.", flag_values=FLAGS
)
REST = flags.DEFINE_enum(
    "rest", "link", ["link", "copy"], "What a pipeline folder does with the base's other parts.", flag_values=FLAGS
)


def merged(config: TrainConfig, params: Any) -> Any:
    """The transformer's weights, adapters merged into them."""
    if config.model.flux.lora is None:
        return params["flow"]
    return merge_lora(params["flow"], params[COLLECTION], config.model.flux.lora.scale)


def write_transformer(folder: Path, sizes: FluxConfig, flow: Any) -> None:
    """A transformer folder of diffusers."""
    layout = flux_layout(sizes, "diffusers")
    shapes = published_shapes(layout, flow)
    export_folder(folder, export_tensors(layout, flow), shapes, config_to_diffusers(sizes), jnp.dtype(DTYPE.value))


def write_pipeline(target: Path, base: Path, sizes: FluxConfig, flow: Any) -> None:
    """A pipeline folder like `base` with another transformer."""
    with new_folder(target) as folder:
        write_transformer(folder / "transformer", sizes, flow)
        for part in base.iterdir():
            if part.name == "transformer" or part.suffix == ".safetensors":
                continue
            if REST.value == "link":
                (folder / part.name).symlink_to(part.resolve())
            elif part.is_dir():
                shutil.copytree(part, folder / part.name)
            else:
                shutil.copy(part, folder / part.name)


def write_orbax(target: Path, sizes: FluxConfig, flow: Any) -> None:
    """The transformer as `--config.model.flux.transformer` takes it."""
    with new_folder(target) as folder:
        (folder / "config.json").write_text(json.dumps(config_to_diffusers(sizes), indent=2) + "\n")
        weights = jax.tree.map(lambda leaf: leaf.astype(DTYPE.value), flow)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute() / ORBAX, weights)


def main() -> None:
    """Loads and writes."""
    config, workdir = MODEL.config(), MODEL.workdir
    lora, out = config.model.flux.lora, Path(OUT.value)
    if config.model.name != "flux" or config.model.path is None:
        raise ConfigError("model.name", config.model.name, "'flux', with the folder of the pipeline in model.path")
    if TO.value == "peft" and (lora is None or workdir is None):
        raise UserError("--to=peft writes the adapters of a run: expected model.flux.lora in the config, and --workdir")
    base = pipeline_folder(config.model.path, text=TO.value == "pipeline")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        pipeline = load_pipeline(config.model)
        params = pipeline.load(mesh) if workdir is None else restore_params(workdir, pipeline, config, mesh)[0]
        sizes = read_transformer_config(base / "transformer", config.model.flux.transformer)
        if TO.value == "peft":
            assert lora is not None
            file = out if out.suffix == ".safetensors" else out / FILE_NAME
            save_lora(file, params[COLLECTION], lora.scale, flux_layout(sizes, "diffusers"))
        elif TO.value == "orbax":
            write_orbax(out, sizes, merged(config, params))
        elif TO.value == "pipeline":
            write_pipeline(out, base, sizes, merged(config, params))
        else:
            write_transformer(out, sizes, merged(config, params))
    print(f"wrote {out}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
