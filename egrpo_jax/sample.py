"""Prompts to images: `python -m egrpo_jax.sample --config configs/emoji.py --prompts "red heart,cat face" --out x.png`.

Samples the model of the config, or with --workdir that of a training run, by the deterministic flow on the plan's grid.
"""

from __future__ import annotations

import math
from pathlib import Path

import jax
from absl import flags

from egrpo_jax import cli, images
from egrpo_jax.config import from_config_dict
from egrpo_jax.errors import UserError
from egrpo_jax.evaluation import Sampler
from egrpo_jax.flow.schedule import shifted_times
from egrpo_jax.parallel.mesh import REPLICATED, make_mesh, put
from egrpo_jax.pipeline import load_pipeline
from egrpo_jax.progress import restore_params
from egrpo_jax.train_config import TrainConfig

PROMPTS = flags.DEFINE_list("prompts", None, "Prompts, separated by commas.", required=True)
OUT = flags.DEFINE_string("out", None, "PNG file to write, one sheet of all images.", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Take the weights of this training run instead of the config's.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)


def main() -> None:
    """Samples and writes the sheet."""
    config = from_config_dict(TrainConfig, cli.CONFIG.value)
    prompts = [prompt.strip() for prompt in PROMPTS.value if prompt.strip()]
    if not prompts:
        raise UserError(f"--prompts: found {PROMPTS.value}, expected at least one prompt")
    pipeline = load_pipeline(config.model)
    params, source = pipeline.params, "the config's weights"
    if WORKDIR.value is not None:
        params, iteration = restore_params(Path(WORKDIR.value), pipeline, config)
        source = f"{WORKDIR.value}, iteration {iteration}"
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        times = shifted_times(config.plan.num_steps, config.plan.shift)
        sampler = Sampler(pipeline, times, min(config.evaluation.batch, len(prompts)))
        pictures = sampler(put(mesh, params, REPLICATED), prompts, jax.random.key(SEED.value))
    images.save_png(images.grid(pictures, math.ceil(math.sqrt(len(prompts))), prompts), OUT.value)
    print(f"{len(prompts)} images from {source}: {OUT.value}")


if __name__ == "__main__":
    cli.run(main)
