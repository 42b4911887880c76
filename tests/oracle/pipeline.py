"""diffusers' FluxPipeline on the pipeline in miniature; `python -m tests.oracle.pipeline` writes the golden."""

import tempfile
from pathlib import Path

import jax
import numpy as np

from egrpo_jax.rl.transitions import initial_noise, prompt_keys
from tests import tiny_flux

GOLDEN = Path(__file__).parent.parent / "golden" / "pipeline.npz"
PROMPTS = ["a red cat", "dog 7, 3", ""]
STEPS = 4


def first_noise(seed=0):
    """What `sample --seed` starts from: packed latents `[P, N, D]`."""
    return np.asarray(initial_noise(prompt_keys(jax.random.key(seed), 0, len(PROMPTS)), (4, 16)))


def load(folder):
    """The pipeline in `folder`, by diffusers."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(pipeline, guidance=3.5):
    """Images `[P, H, W, 3]` in [0, 1] from our noise, on the pipeline's own grid."""
    import torch

    return pipeline(
        PROMPTS,
        height=tiny_flux.SIZE,
        width=tiny_flux.SIZE,
        num_inference_steps=STEPS,
        max_sequence_length=tiny_flux.TEXT_TOKENS,
        guidance_scale=guidance,
        latents=torch.tensor(first_noise()),
        output_type="np",
    ).images


def cases():
    """Images of the pipeline with guidance embedding (dev) and without (schnell)."""
    with tempfile.TemporaryDirectory() as folder:
        dev = tiny_flux.write_pipeline(Path(folder) / "dev")
        schnell = tiny_flux.write_pipeline(Path(folder) / "schnell", guidance=False)
        return {"dev": images(load(dev)), "schnell": images(load(schnell))}


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **cases())
