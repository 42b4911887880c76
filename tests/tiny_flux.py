"""A complete FLUX.1 pipeline folder in miniature, with random weights, laid out exactly like the published ones."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from egrpo_jax.models.clip import ClipText, ClipTextConfig, TransformerConfig
from egrpo_jax.models.flux import FluxConfig
from egrpo_jax.models.t5 import T5Config, T5Encoder
from egrpo_jax.models.vae import VaeConfig
from egrpo_jax.pipelines import ModelConfig
from egrpo_jax.pipelines.families import FLUX
from egrpo_jax.pipelines.published import LoraOptions, PublishedOptions
from egrpo_jax.pipelines.published.loading import decoder_shapes
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.optimizer import OptimConfig
from egrpo_jax.training.config import CheckpointConfig, EvaluationConfig, RewardsConfig, TrainConfig, train_config
from egrpo_jax.weights.layout import published_shapes
from egrpo_jax.weights.published.clip import clip_text_layout
from egrpo_jax.weights.published.flux import config_to_diffusers, flux_layout
from egrpo_jax.weights.published.t5 import t5_layout
from egrpo_jax.weights.published.vae import vae_layout
from tests.oracle.random_weights import random_tensors

TEXT_TOKENS = 12
LONGER = 40
LONGER_TEXTS = ("Flux2Transformer2DModel", "ZImageTransformer2DModel")
"""Those whose prompts are within the words of a chat."""
SIZE = 32
MERGES = ["c a", "ca t</w>", "r e", "re d</w>", "h e", "d o", "do g</w>"]
PIECES = ["▁cat", "▁red", "▁a", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789,.-"]

VAE = VaeConfig(
    block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, scaling_factor=0.8
)
T5 = T5Config(vocab_size=64, width=24, num_layers=2, num_heads=2, head_dim=8, mlp_dim=32)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CLIP_TOKENS = [
    *BYTES,
    *(byte + "</w>" for byte in BYTES),
    *(merge.replace(" ", "") for merge in MERGES),
    "<|startoftext|>",
    "<|endoftext|>",
]
CLIP = ClipTextConfig(TransformerConfig(20, 2, 2, 40, "quick_gelu"), vocab_size=len(CLIP_TOKENS))
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def get_config(folder):
    """A config file for the programs, for the folder of any family: `tests/tiny_flux.py:FOLDER` trains all weights,
    `...:FOLDER,lora` adapters.

    `...,int8` trains these to a base in int8. `...,offload` has the moments on the hosts. `...,bfloat16` computes in
    that, and its updates, one for each active step, move no parameter.
    """
    path, *variants = folder.split(",")
    config = Path(path) / "transformer" / "config.json"
    class_name = json.loads(config.read_text())["_class_name"] if config.is_file() else ""
    still, int8 = "bfloat16" in variants, "int8" in variants
    return train_config(
        TrainConfig(
            name="tiny_flux",
            num_iterations=2,
            prompts_per_iteration=2,
            model=ModelConfig(
                name="published",
                path=path,
                published=PublishedOptions(
                    height=SIZE,
                    width=SIZE,
                    text_tokens=LONGER if class_name in LONGER_TEXTS else TEXT_TOKENS,
                    guidance=3.0 if class_name.startswith("ZImage") else None,
                    lora=LoraOptions(rank=2, alpha=4.0) if int8 or "lora" in variants else None,
                    int8_base=int8,
                    dtype="bfloat16" if still else "float32",
                    decode_batch=3,
                ),
            ),
            rewards=RewardsConfig(train=("tests.toy:brightness",)),
            plan=EGrpo(num_steps=4, group_size=3),
            learner=LearnerConfig(micro_batch=1, updates="per_active_step" if still else "joint"),
            # A large epsilon: AdamW would else blow gradients that are rounding errors up to whole steps.
            optim=OptimConfig(learning_rate=1e-12 if still else 1e-2, eps=1e-3, offload="offload" in variants),
            evaluation=EvaluationConfig(prompts="emoji_heldout", every=2, batch=4, kept=2),
            checkpoint=CheckpointConfig(every=1),
        )
    )


def flux_config(guidance=True):
    return FluxConfig(
        in_channels=16, num_double_blocks=2, num_single_blocks=2, num_heads=2, head_dim=16, text_dim=24, pooled_dim=20,
        guidance_embed=guidance, axes_dims=(4, 6, 6),
    )  # fmt: skip


def write_pipeline(folder, guidance=True):
    """Writes the folder and returns it."""
    config = flux_config(guidance)
    write_json(folder / "model_index.json", INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_model(
        folder / "transformer",
        "diffusion_pytorch_model",
        config_to_diffusers(config),
        published_shapes(flux_layout(config, "diffusers"), FLUX.shapes(config)),
    )
    write_vae(folder / "vae", VAE)
    write_clip(folder / "text_encoder", CLIP)
    write_t5(folder / "text_encoder_2", T5)
    write_clip_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2")
    return folder


def write_vae(folder, config):
    tensors = published_shapes(vae_layout(config, "diffusers"), decoder_shapes(config)) | encoder_shapes(config)
    write_model(folder, "diffusion_pytorch_model", vae_json(config), tensors)


def write_clip(folder, config):
    write_model(folder, "model", clip_json(config), shapes(ClipText(config), clip_text_layout(config)))


def write_t5(folder, config):
    write_model(folder, "model", t5_json(config), shapes(T5Encoder(config), t5_layout(config)))


def shapes(model, layout):
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))["params"]
    return published_shapes(layout, params)


def encoder_shapes(config):
    """Names and shapes of a published VAE's encoder, which nothing here reads."""
    *_, last = levels = config.block_out_channels
    layers = {"conv_in": (levels[0], 3, 3, 3), "conv_norm_out": (last,), "mid_block.attentions.0.group_norm": (last,)}
    layers["conv_out"] = (2 * config.latent_channels, last, 3, 3)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        layers[f"mid_block.attentions.0.{name}"] = (last, last)
    blocks = {f"mid_block.resnets.{index}": (last, last) for index in range(2)}
    for level, out in enumerate(levels):
        for index in range(config.layers_per_block):
            inner = levels[max(level - 1, 0)] if index == 0 else out
            blocks[f"down_blocks.{level}.resnets.{index}"] = (inner, out)
        if level < len(levels) - 1:
            layers[f"down_blocks.{level}.downsamplers.0.conv"] = (out, out, 3, 3)
    for name, (inner, out) in blocks.items():
        layers |= {f"{name}.norm1": (inner,), f"{name}.norm2": (out,)}
        layers |= {f"{name}.conv1": (out, inner, 3, 3), f"{name}.conv2": (out, out, 3, 3)}
        if inner != out:
            layers[f"{name}.conv_shortcut"] = (out, inner, 1, 1)
    weights = {f"encoder.{name}.weight": shape for name, shape in layers.items()}
    return weights | {f"encoder.{name}.bias": shape[:1] for name, shape in layers.items()}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_model(folder, stem, config, tensor_shapes):
    write_json(folder / "config.json", config)
    tensors = {name: np.array(value, order="C") for name, value in random_tensors(tensor_shapes).items()}
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def vae_json(config=VAE):
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "force_upcast": True,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": config.latent_channels,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": True,
        "norm_num_groups": config.norm_num_groups,
        "sample_size": SIZE,
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def clip_json(config=CLIP):
    projected = config.projection_dim is not None
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": config.transformer.width,
        "num_hidden_layers": config.transformer.num_layers,
        "num_attention_heads": config.transformer.num_heads,
        "intermediate_size": config.transformer.mlp_dim,
        "hidden_act": config.transformer.activation,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.length,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "layer_norm_eps": 1e-5,
        "projection_dim": config.projection_dim or config.transformer.width,
    }


def t5_json(config=T5):
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": config.width,
        "d_kv": config.head_dim,
        "d_ff": config.mlp_dim,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": 1e-6,
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def write_clip_tokenizer(folder, pad="<|endoftext|>"):
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(CLIP_TOKENS)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", "utf-8")
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    names["pad_token"] = pad
    write_json(folder / "special_tokens_map.json", names)
    write_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP.length, **names}
    )


def write_t5_tokenizer(folder):
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((p, -2.0 - 0.1 * i) for i, p in enumerate(PIECES))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", names)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "T5TokenizerFast", "model_max_length": 512, "extra_ids": 0, **names},
    )
