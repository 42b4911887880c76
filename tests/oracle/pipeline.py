"""diffusers' pipelines on those in miniature; `python -m tests.oracle.pipeline` writes the golden."""

import functools
import tempfile
from pathlib import Path

import jax
import numpy as np

from egrpo_jax.models.vae import unpack_latents
from egrpo_jax.rl.transitions import initial_noise, prompt_keys
from tests import tiny_flux, tiny_sd3
from tests.oracle.torchvision_shim import define_missing_operators

GOLDEN = Path(__file__).parent.parent / "golden" / "pipeline.npz"
PROMPTS = ["a red cat!", "dog 7, 3", ""]
STEPS = 4
GRID = (2, 2)
FOLDERS = {
    "flux_dev": tiny_flux.write_pipeline,
    "flux_schnell": functools.partial(tiny_flux.write_pipeline, guidance=False),
    "sd3_medium": tiny_sd3.write_pipeline,
    "sd3_large": functools.partial(tiny_sd3.write_pipeline, config=tiny_sd3.LARGE),
}
"""All kinds of pipelines, by what writes a folder of each."""


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
    unpacked = np.array(unpack_latents(first_noise(16), GRID)).transpose(0, 3, 1, 2)
    return {"latents": unpacked, "guidance_scale": guidance}


ARGUMENTS = {"FluxPipeline": _flux, "StableDiffusion3Pipeline": _sd3}


def images(pipeline):
    """Images `[P, H, W, 3]` in [0, 1] from our noise, on the pipeline's own grid, guided as is published."""
    import torch

    arguments = ARGUMENTS[type(pipeline).__name__](pipeline)
    return pipeline(
        PROMPTS,
        height=tiny_flux.SIZE,
        width=tiny_flux.SIZE,
        num_inference_steps=STEPS,
        max_sequence_length=tiny_flux.TEXT_TOKENS,
        output_type="np",
        **arguments | {"latents": torch.tensor(arguments["latents"])},
    ).images


def cases():
    """The images of every pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        return {name: images(load(write(Path(folder) / name))) for name, write in FOLDERS.items()}


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **cases())
