"""Pipeline folders in miniature of the families that read Qwen3: FLUX.2 and Z-Image."""

from tokenizers import Tokenizer

from egrpo_jax.models.flux2 import Flux2Config
from egrpo_jax.models.vae import VaeConfig
from egrpo_jax.models.z_image import ZImageConfig
from egrpo_jax.pipelines.families import FLUX2, Z_IMAGE
from egrpo_jax.pipelines.published.loading import decoder_shapes
from egrpo_jax.weights.layout import published_shapes
from egrpo_jax.weights.published import flux2, z_image
from egrpo_jax.weights.published.vae import vae_layout
from tests import tiny_flux
from tests.oracle.qwen3 import published_config
from tests.oracle.qwen_tokenizer import write_qwen, write_settings

WIDTH = 16
KLEIN = Flux2Config(
    in_channels=16, num_double_blocks=2, num_single_blocks=2, num_heads=2, head_dim=16, text_dim=3 * WIDTH,
    axes_dims=(4, 4, 4, 4),
)  # fmt: skip
IMAGE = ZImageConfig(
    in_channels=16, num_layers=2, num_refiner_layers=1, num_heads=3, head_dim=16, text_dim=WIDTH, axes_dims=(4, 6, 6),
    axes_lens=(128, 32, 32),
)  # fmt: skip
FLUX2_VAE = VaeConfig(
    block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=1.0,
    shift_factor=0.0, use_post_quant_conv=True, batch_norm_eps=1e-4,
)  # fmt: skip
INDEX = {
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
}
STEM = "diffusion_pytorch_model"


def write_flux2(folder, config=KLEIN, is_distilled=False):
    """Writes the folder of a FLUX.2-klein, and returns it."""
    parts = {"transformer": ["diffusers", "Flux2Transformer2DModel"], "vae": ["diffusers", "AutoencoderKLFlux2"]}
    index = INDEX | parts | {"_class_name": "Flux2KleinPipeline", "is_distilled": is_distilled}
    tiny_flux.write_json(folder / "model_index.json", index)
    tiny_flux.write_json(folder / "scheduler" / "scheduler_config.json", tiny_flux.SCHEDULER)
    shapes = published_shapes(flux2.flux2_layout(config, "diffusers"), FLUX2.shapes(config))
    tiny_flux.write_model(folder / "transformer", STEM, flux2.config_to_diffusers(config), shapes)
    latents = FLUX2_VAE.latent_channels
    vae = published_shapes(vae_layout(FLUX2_VAE, "diffusers"), decoder_shapes(FLUX2_VAE))
    vae |= tiny_flux.encoder_shapes(FLUX2_VAE) | {"bn.num_batches_tracked": ()}
    vae |= {"quant_conv.weight": (2 * latents, 2 * latents, 1, 1), "quant_conv.bias": (2 * latents,)}
    tiny_flux.write_model(folder / "vae", STEM, vae_json(), vae)
    write_text(folder, layers=28)
    return folder


def write_z_image(folder, config=IMAGE):
    """Writes the folder of a Z-Image, and returns it."""
    parts = {"transformer": ["diffusers", "ZImageTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    tiny_flux.write_json(folder / "model_index.json", INDEX | parts | {"_class_name": "ZImagePipeline"})
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 6.0}
    tiny_flux.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    shapes = published_shapes(z_image.z_image_layout(config, "diffusers"), Z_IMAGE.shapes(config))
    tiny_flux.write_model(folder / "transformer", STEM, z_image.config_to_diffusers(config), shapes)
    tiny_flux.write_vae(folder / "vae", tiny_flux.VAE)
    write_text(folder, layers=3)
    return folder


def vae_json():
    keys = tiny_flux.vae_json(FLUX2_VAE)
    for key in ("latents_mean", "latents_std", "scaling_factor", "shift_factor"):
        del keys[key]
    changes = {"_class_name": "AutoencoderKLFlux2", "use_quant_conv": True, "use_post_quant_conv": True}
    return keys | changes | {"batch_norm_eps": FLUX2_VAE.batch_norm_eps, "patch_size": [2, 2]}


def write_text(folder, layers):
    """A Qwen3 of so many layers, and its tokenizer."""
    (folder / "tokenizer").mkdir()
    write_qwen(folder / "tokenizer")
    write_settings(folder / "tokenizer")
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json")).get_vocab_size()
    keys = published_config(WIDTH, layers, heads=2, kv_heads=1, head_dim=8, mlp=24, vocab=vocabulary)
    keys |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    tiny_flux.write_model(folder / "text_encoder", "model", keys, text_shapes(vocabulary, layers))


def text_shapes(vocabulary, layers, heads=2, kv_heads=1, head_dim=8, mlp=24):
    """Names and shapes of all the tensors of a Qwen3ForCausalLM whose head is tied."""
    shapes = {"model.embed_tokens.weight": (vocabulary, WIDTH), "model.norm.weight": (WIDTH,)}
    queries, keys = heads * head_dim, kv_heads * head_dim
    block = {
        "self_attn.q_proj": (queries, WIDTH), "self_attn.k_proj": (keys, WIDTH), "self_attn.v_proj": (keys, WIDTH),
        "self_attn.o_proj": (WIDTH, queries), "self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,),
        "mlp.gate_proj": (mlp, WIDTH), "mlp.up_proj": (mlp, WIDTH), "mlp.down_proj": (WIDTH, mlp),
        "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
    }  # fmt: skip
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes
