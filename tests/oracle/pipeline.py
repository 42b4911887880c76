"""diffusers' pipelines on those in miniature; `python -m tests.oracle.pipeline` writes the golden."""

import functools
import re
import tempfile
from pathlib import Path

import jax
import numpy as np

from egrpo_jax.models.vae import unpack_latents
from egrpo_jax.rl.transitions import initial_noise, prompt_keys
from tests import tiny_flux, tiny_qwen, tiny_sd3
from tests.oracle.torchvision_shim import define_missing_operators

GOLDEN = Path(__file__).parent.parent / "golden" / "pipeline.npz"
PROMPTS = ["a red cat!", "dog 7, 3", ""]
STEPS = 4
Z_IMAGE_GUIDANCE = 3.0
GRID = (2, 2)
FOLDERS = {
    "flux_dev": tiny_flux.write_pipeline,
    "flux_schnell": functools.partial(tiny_flux.write_pipeline, guidance=False),
    "sd3_medium": tiny_sd3.write_pipeline,
    "sd3_large": functools.partial(tiny_sd3.write_pipeline, config=tiny_sd3.LARGE),
    "flux2_base": tiny_qwen.write_flux2,
    "flux2_distilled": functools.partial(tiny_qwen.write_flux2, is_distilled=True),
    "z_image": tiny_qwen.write_z_image,
}
"""All kinds of pipelines, by what writes a folder of each."""


def text_tokens(name):
    """The length of text for the pipeline of this name, of `FOLDERS` or of diffusers."""
    return tiny_flux.LONGER if re.match("(?i)flux2|z_?image", name) else tiny_flux.TEXT_TOKENS


def first_noise(channels, seed=0):
    """What `sample --seed` starts from: packed latents `[P, N, channels]`."""
    keys = prompt_keys(jax.random.key(seed), 0, len(PROMPTS))
    return np.array(initial_noise(keys, (GRID[0] * GRID[1], channels)))


def load(folder):
    """The pipeline in `folder`, by diffusers."""
    define_missing_operators()
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _flux(_):
    return {"latents": first_noise(16), "guidance_scale": 3.5}


def _sd3(pipeline):
    guidance = 4.5 if pipeline.transformer.config.dual_attention_layers else 3.5
    return {"latents": _unpacked(), "guidance_scale": guidance}


def _unpacked():
    return np.array(unpack_latents(first_noise(16), GRID)).transpose(0, 3, 1, 2)


def _flux2(_):
    """Latents of a token are its channels already."""
    grid = first_noise(16).reshape(len(PROMPTS), *GRID, 16)
    return {"latents": grid.transpose(0, 3, 1, 2), "guidance_scale": 4.0}


def _z_image(_):
    return {"latents": _unpacked(), "guidance_scale": Z_IMAGE_GUIDANCE}


ARGUMENTS = {
    "FluxPipeline": _flux,
    "StableDiffusion3Pipeline": _sd3,
    "Flux2KleinPipeline": _flux2,
    "ZImagePipeline": _z_image,
}


def images(pipeline):
    """Images `[P, H, W, 3]` in [0, 1] from our noise, on the pipeline's own grid, guided as is published."""
    import torch

    arguments = ARGUMENTS[type(pipeline).__name__](pipeline)
    return pipeline(
        prompt=list(PROMPTS),  # some pipelines write into it
        height=tiny_flux.SIZE,
        width=tiny_flux.SIZE,
        num_inference_steps=STEPS,
        max_sequence_length=text_tokens(type(pipeline).__name__),
        output_type="np",
        **arguments | {"latents": torch.tensor(arguments["latents"])},
    ).images


def cases():
    """The images of every pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: images(load(write(Path(folder) / name))) for name, write in FOLDERS.items()}


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **cases())
