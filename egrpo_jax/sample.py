"""Prompts to images.

    python -m egrpo_jax.sample --config configs/emoji.py --prompt "red heart" --prompt "cat face" --out x.png

Samples the model of the config, or with --workdir that of a training run, by the deterministic flow. An --out that
ends in .png, .jpg, .jpeg or .webp is one sheet of all images, 256 at most. Any other is a folder: an image for each
prompt, written as it comes, `samples.json`, `grid.png`; the same command goes on where it was interrupted. An image
depends on the prompt, its index and the seed, never on --batch or the number of devices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from tqdm import tqdm

from egrpo_jax import cli
from egrpo_jax.cli.model import ModelFlags
from egrpo_jax.cli.sampling import SamplingFlags
from egrpo_jax.common.config import to_config_dict
from egrpo_jax.evaluation.sampler import pixels
from egrpo_jax.evaluation.samples import open_samples
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.pipelines import Pipeline, load_pipeline
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.state import restore_params

FLAGS = flags.FlagValues()
MODEL = ModelFlags(FLAGS)
SAMPLING = SamplingFlags(FLAGS)
OUT = flags.DEFINE_string(
    "out", None, "Image file for one sheet of all images, or a folder.", required=True, flag_values=FLAGS
)


def load_params(config: TrainConfig, pipeline: Pipeline, mesh: Mesh) -> tuple[Any, str]:
    """The parameters that the flags name, and what they are."""
    if MODEL.workdir is None:
        return pipeline.load(mesh), "the config's weights"
    params, iteration = restore_params(MODEL.workdir, pipeline, config, mesh)
    return params, f"{MODEL.workdir}, iteration {iteration}"


def main() -> None:
    """Samples and writes."""
    config = MODEL.config()
    _, prompts = SAMPLING.prompts()
    samples = open_samples(Path(OUT.value), prompts)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        pipeline = load_pipeline(config.model)
        pipeline.require(prompts)
        params, source = load_params(config, pipeline, mesh)
        sampling = SAMPLING.sampling(config, pipeline, len(prompts))
        settings = {"weights": source, "seed": SAMPLING.seed, **sampling.record()}
        settings |= {"model": to_config_dict(config.model).to_dict(), "about": dict(pipeline.about)}
        done = samples.begin(settings)
        sampler, key = sampling.sampler(pipeline), jax.random.key(SAMPLING.seed)
        with tqdm(total=len(prompts), initial=done, desc="sample", unit="image", disable=None) as bar:
            for first, images in sampler(params, prompts[done:], key, done):
                samples.add(first, pixels(images, prompts[first : first + len(images)]))
                bar.update(len(images))
        samples.finish()
    print(f"{len(prompts)} images from {source}: {OUT.value}" + (f" ({done} were there already)" if done else ""))


if __name__ == "__main__":
    cli.run(main, FLAGS)
