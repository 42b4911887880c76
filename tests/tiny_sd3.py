"""A complete SD3.5 pipeline folder in miniature, with random weights, laid out exactly like the published ones."""

import dataclasses

from egrpo_jax.models.clip import TransformerConfig
from egrpo_jax.models.sd3 import Sd3Config
from egrpo_jax.pipelines.families import SD3
from egrpo_jax.weights.layout import published_shapes
from egrpo_jax.weights.published.sd3 import config_to_diffusers, sd3_layout
from tests import tiny_flux

MEDIUM = Sd3Config(
    in_channels=16, num_blocks=3, num_dual_blocks=1, num_heads=2, head_dim=16, text_dim=48, pooled_dim=30, max_grid=6
)
LARGE = dataclasses.replace(MEDIUM, num_dual_blocks=0, num_blocks=2)
CLIP_L = dataclasses.replace(tiny_flux.CLIP, projection_dim=14)
CLIP_G = dataclasses.replace(tiny_flux.CLIP, transformer=TransformerConfig(24, 3, 2, 48, "gelu"), projection_dim=16)
T5 = dataclasses.replace(tiny_flux.T5, width=48)
VAE = dataclasses.replace(tiny_flux.VAE, scaling_factor=1.5305, shift_factor=0.0609)
SCHEDULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
INDEX = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_pipeline(folder, config=MEDIUM):
    """Writes the folder and returns it."""
    tiny_flux.write_json(folder / "model_index.json", INDEX)
    tiny_flux.write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    transformer = published_shapes(sd3_layout(config), SD3.shapes(config))
    stem = "diffusion_pytorch_model"
    tiny_flux.write_model(folder / "transformer", stem, config_to_diffusers(config), transformer)
    tiny_flux.write_vae(folder / "vae", VAE)
    tiny_flux.write_clip(folder / "text_encoder", CLIP_L)
    tiny_flux.write_clip(folder / "text_encoder_2", CLIP_G)
    tiny_flux.write_t5(folder / "text_encoder_3", T5)
    tiny_flux.write_clip_tokenizer(folder / "tokenizer")
    tiny_flux.write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    tiny_flux.write_t5_tokenizer(folder / "tokenizer_3")
    return folder
