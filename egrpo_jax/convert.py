"""Weights from one form into another.

    python -m egrpo_jax.convert --workdir runs/flux_lora --to diffusers --out tuned

Takes the weights of the config, or with --workdir those of a training run (their average where one is kept). Those of
published models go to

  diffusers  a transformer folder: config.json and safetensors, adapters merged into the weights;
  pipeline   a whole pipeline folder: that transformer, all else linked or copied (--rest) from the base;
  peft       the adapters alone, as `load_lora_weights` of diffusers' pipelines takes them;
  orbax      the transformer as an Orbax checkpoint, for --config.model.published.transformer.
"""

from __future__ import annotations

from pathlib import Path

import jax
from absl import flags

from egrpo_jax import cli
from egrpo_jax.cli.model import ModelFlags
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.pipelines import EXPORTS, Export, exact_model, load_pipeline, load_writer
from egrpo_jax.training.state import restore_params

FLAGS = flags.FlagValues()
MODEL = ModelFlags(FLAGS)
TO = flags.DEFINE_enum("to", None, EXPORTS, "What to write.", required=True, flag_values=FLAGS)
OUT = flags.DEFINE_string(
    "out", None, "New folder, or for peft a file or folder, to write.", required=True, flag_values=FLAGS
)
DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of the weights in the files.", flag_values=FLAGS
)
REST = flags.DEFINE_enum(
    "rest", "link", ["link", "copy"], "What a pipeline folder does with the base's other parts.", flag_values=FLAGS
)


def main() -> None:
    """Loads and writes."""
    config, workdir = MODEL.config(), MODEL.workdir
    export = Export(Path(OUT.value), DTYPE.value, copy=REST.value == "copy", of_run=workdir is not None)
    model = exact_model(config.model)
    write = load_writer(model, TO.value, export)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        pipeline = load_pipeline(model)
        write(pipeline.load(mesh) if workdir is None else restore_params(workdir, pipeline, config, mesh)[0])
    print(f"wrote {OUT.value}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
