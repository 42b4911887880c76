"""Prompts to images: `python -m egrpo_jax.sample --config configs/emoji.py --prompts "red heart,cat face" --out x.png`.

Samples the model of the config, or with --workdir that of a training run, by the deterministic flow. An --out that
ends in .png is one sheet of all images; any other is a folder: an image for each prompt, `grid.png`, `samples.json`.
An image depends on the prompt, its place and the seed, never on --batch or the number of devices.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from PIL import Image

from egrpo_jax import cli
from egrpo_jax.cli.sampling import SEED, WORKDIR, chosen_sampling
from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.errors import UserError
from egrpo_jax.common.images import to_uint8
from egrpo_jax.data.prompts import read_prompts
from egrpo_jax.figures import grids as images
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.pipelines import load_pipeline
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.state import restore_params

PROMPTS = flags.DEFINE_list("prompts", None, "Prompts, separated by commas.")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "Prompts from a file (txt, JSONL or CSV) or a built-in set.")
OUT = flags.DEFINE_string("out", None, "PNG file for one sheet of all images, or a folder.", required=True)


def chosen_prompts() -> list[str]:
    """The prompts that the flags name."""
    if (PROMPTS.value is None) == (PROMPT_FILE.value is None):
        raise UserError("expected one of --prompts and --prompt_file")
    if PROMPT_FILE.value is not None:
        return read_prompts(PROMPT_FILE.value)
    prompts = [prompt.strip() for prompt in PROMPTS.value or () if prompt.strip()]
    if not prompts:
        raise UserError(f"--prompts: found {PROMPTS.value}, expected at least one prompt")
    return prompts


def write(out: Path, pictures: np.ndarray, prompts: list[str], settings: dict[str, Any]) -> None:
    """Writes the sheet, or the folder."""
    sheet = images.grid(pictures, math.ceil(math.sqrt(len(prompts))), prompts)
    if out.suffix.lower() == ".png":
        images.save_png(sheet, out)
        return
    samples = [{"prompt": prompt, "file": f"{place:05d}.png"} for place, prompt in enumerate(prompts)]
    for sample, picture in zip(samples, pictures, strict=True):
        images.save_png(Image.fromarray(to_uint8(picture)), out / sample["file"])
    images.save_png(sheet, out / "grid.png")
    atomic_write(out / "samples.json", json.dumps(settings | {"samples": samples}, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    """Samples and writes."""
    config = from_config_dict(TrainConfig, cli.CONFIG.value)
    prompts = chosen_prompts()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        pipeline = load_pipeline(config.model)
        pipeline.require(prompts)
        if WORKDIR.value is None:
            params, source = pipeline.load(mesh), "the config's weights"
        else:
            params, iteration = restore_params(Path(WORKDIR.value), pipeline, config, mesh)
            source = f"{WORKDIR.value}, iteration {iteration}"
        sampling = chosen_sampling(config, pipeline, len(prompts))
        pictures = sampling.sampler(pipeline)(params, prompts, jax.random.key(SEED.value))
    settings = {"weights": source, "seed": SEED.value, "steps": sampling.steps, "shift": sampling.shift}
    write(Path(OUT.value), pictures, prompts, settings | {"model": cli.CONFIG.value.model.to_dict()})
    print(f"{len(prompts)} images from {source}: {OUT.value}")


if __name__ == "__main__":
    cli.run(main)
