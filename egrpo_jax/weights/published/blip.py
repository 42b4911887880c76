"""ImageReward as it is published: the flat state dict in `ImageReward.pt`."""

from __future__ import annotations

from egrpo_jax.models.blip import BlipConfig
from egrpo_jax.weights.layout import CONV, Form, Layout, entry, for_layers, linear, norm

IGNORED = (r"blip\.text_encoder\.embeddings\.position_ids", r"blip\.(vision|text)_proj\.(weight|bias)")
"""Patterns of whole names that no score needs: the numbers 0 to 511, and projections for BLIP's contrastive loss."""

_WITHOUT_BATCH = Form(lambda x: x[0], lambda x: x[None])
_HEAD = (0, 2, 4, 6, 7)
"""Numbers of the linear layers among those of the published head; the others are dropout."""


def blip_layout(config: BlipConfig) -> Layout:
    """The tensors of a model of this size that a score needs, 620 of ImageReward's 625."""
    return (*_vision(config), *_text(config), *_head(config))


def _vision(config: BlipConfig) -> Layout:
    prefix, block, ours = "blip.visual_encoder.", "blip.visual_encoder.blocks.{}.", "vision/blocks/"
    qkv = (f"{ours}attention/{name}" for name in ("to_q", "to_k", "to_v"))
    blocks = (
        *norm(f"{block}norm1", f"{ours}attention_norm"),
        *linear(f"{block}attn.qkv", *qkv),
        *linear(f"{block}attn.proj", f"{ours}attention/out"),
        *norm(f"{block}norm2", f"{ours}mlp_norm"),
        *linear(f"{block}mlp.fc1", f"{ours}mlp/in"),
        *linear(f"{block}mlp.fc2", f"{ours}mlp/out"),
    )
    return (
        entry(f"{prefix}cls_token", "vision/class_token", form=_WITHOUT_BATCH),
        entry(f"{prefix}pos_embed", "vision/positions", form=_WITHOUT_BATCH),
        entry(f"{prefix}patch_embed.proj.weight", "vision/patches/kernel", form=CONV),
        entry(f"{prefix}patch_embed.proj.bias", "vision/patches/bias"),
        *for_layers(config.vision.num_layers, blocks),
        *norm(f"{prefix}norm", "vision/final_norm"),
    )


def _text(config: BlipConfig) -> Layout:
    prefix = "blip.text_encoder.embeddings."
    block, ours = "blip.text_encoder.encoder.layer.{}.", "text/blocks/"
    blocks = (
        *_attention(f"{block}attention", f"{ours}attention"),
        *_attention(f"{block}crossattention", f"{ours}image_attention"),
        *linear(f"{block}intermediate.dense", f"{ours}mlp/in"),
        *linear(f"{block}output.dense", f"{ours}mlp/out"),
        *norm(f"{block}output.LayerNorm", f"{ours}mlp_norm"),
    )
    return (
        entry(f"{prefix}word_embeddings.weight", "text/tokens/embedding"),
        entry(f"{prefix}position_embeddings.weight", "text/positions"),
        *norm(f"{prefix}LayerNorm", "text/first_norm"),
        *for_layers(config.text.num_layers, blocks),
    )


def _attention(name: str, path: str) -> Layout:
    return (
        *linear(f"{name}.self.query", f"{path}/to_q"),
        *linear(f"{name}.self.key", f"{path}/to_k"),
        *linear(f"{name}.self.value", f"{path}/to_v"),
        *linear(f"{name}.output.dense", f"{path}/out"),
        *norm(f"{name}.output.LayerNorm", f"{path}_norm"),
    )


def _head(config: BlipConfig) -> Layout:
    numbers = zip(_HEAD, range(len(config.head)), strict=True)
    return tuple(e for number, index in numbers for e in linear(f"mlp.layers.{number}", f"head_{index}"))
