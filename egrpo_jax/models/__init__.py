"""Models as pure Flax Linen modules, each with a config of its sizes, and low-rank adapters for them."""

from egrpo_jax.models.attention import Backend, apply_rope, attention, rope_table
from egrpo_jax.models.blip import Blip, BlipConfig
from egrpo_jax.models.clip import Clip, ClipConfig, ClipText, ClipTextConfig, ClipVisionConfig, TransformerConfig
from egrpo_jax.models.flux import Flux, FluxConfig
from egrpo_jax.models.flux2 import Flux2, Flux2Config
from egrpo_jax.models.layers import Remat, StackConfig
from egrpo_jax.models.lora import LoraConfig, apply_lora, init_lora, merge_lora
from egrpo_jax.models.patches import latents_to_pixels, pixels_to_latents
from egrpo_jax.models.sd3 import Sd3, Sd3Config
from egrpo_jax.models.t5 import T5Config, T5Encoder
from egrpo_jax.models.text_encoder import TextEncoder, TextEncoderConfig, TextFeatures
from egrpo_jax.models.towers import Tower, TowerConfig
from egrpo_jax.models.vae import Vae, VaeConfig, latents_to_images, micro_batched, tiled
from egrpo_jax.models.z_image import ZImage, ZImageConfig

__all__ = [
    "Backend",
    "Blip",
    "BlipConfig",
    "Clip",
    "ClipConfig",
    "ClipText",
    "ClipTextConfig",
    "ClipVisionConfig",
    "Flux",
    "Flux2",
    "Flux2Config",
    "FluxConfig",
    "LoraConfig",
    "Remat",
    "Sd3",
    "Sd3Config",
    "StackConfig",
    "T5Config",
    "T5Encoder",
    "TextEncoder",
    "TextEncoderConfig",
    "TextFeatures",
    "Tower",
    "TowerConfig",
    "TransformerConfig",
    "Vae",
    "VaeConfig",
    "ZImage",
    "ZImageConfig",
    "apply_lora",
    "apply_rope",
    "attention",
    "init_lora",
    "latents_to_images",
    "latents_to_pixels",
    "merge_lora",
    "micro_batched",
    "pixels_to_latents",
    "rope_table",
    "tiled",
]
