"""CLIP as it is published by transformers: the tensors of `CLIPModel` and `CLIPTextModel`, and their config.json.

Published files of `CLIPTextModel` spell names with `text_model.` in front; those that transformers 5 writes do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.clip import ACTIVATIONS, ClipConfig, ClipTextConfig, ClipVisionConfig, TransformerConfig
from egrpo_jax.weights.layout import CONV, LINEAR, Layout, entry, for_layers, linear, norm

PREFIX = "text_model."
IGNORED = (r"((text|vision)_model\.)?embeddings\.position_ids",)
"""Patterns of whole names that older files have and no parameter is in: the numbers of the positions."""

_LEGACY_EOS_ID = 2  # in configs that mean the position of the highest id

_LINEARS = (
    ("to_q", "self_attn.q_proj"),
    ("to_k", "self_attn.k_proj"),
    ("to_v", "self_attn.v_proj"),
    ("out", "self_attn.out_proj"),
    ("mlp_1", "mlp.fc1"),
    ("mlp_2", "mlp.fc2"),
)
_NORMS = (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2"))

# What counts where a part of a CLIPModel's config.json is silent.
_TEXT_DEFAULTS = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "vocab_size": 49408, "max_position_embeddings": 77,
}  # fmt: skip
_VISION_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip


def text_prefix(names: Iterable[str]) -> str:
    """How a file spells its tensors: `"text_model."` or `""`, whatever stands before their names."""
    return PREFIX if any(name.startswith(PREFIX) for name in names) else ""


def clip_text_layout(config: ClipTextConfig, prefix: str = PREFIX, folder: str = "") -> Layout:
    """The tensors of a text encoder of this size, 196 for CLIP-L.

    `prefix` is what stands before their names; `folder`, such as "text/", before our paths.
    """
    return (
        entry(f"{prefix}embeddings.token_embedding.weight", f"{folder}tokens/embedding"),
        entry(f"{prefix}embeddings.position_embedding.weight", f"{folder}positions"),
        *_blocks(config.transformer, prefix, folder),
        *norm(f"{prefix}final_layer_norm", f"{folder}final_norm"),
    )


def clip_layout(config: ClipConfig) -> Layout:
    """The tensors of a `CLIPModel` of this size, 910 for ViT-H-14."""
    vision = "vision_model."
    return (
        *clip_text_layout(config.text, folder="text/"),
        entry(f"{vision}embeddings.class_embedding", "vision/class_token"),
        entry(f"{vision}embeddings.patch_embedding.weight", "vision/patches/kernel", form=CONV),
        entry(f"{vision}embeddings.position_embedding.weight", "vision/positions"),
        *norm(f"{vision}pre_layrnorm", "vision/first_norm"),  # spelled so
        *_blocks(config.vision.transformer, vision, "vision/"),
        *norm(f"{vision}post_layernorm", "vision/final_norm"),
        entry("visual_projection.weight", "image_projection/kernel", form=LINEAR),
        entry("text_projection.weight", "text_projection/kernel", form=LINEAR),
        entry("logit_scale", "logit_scale"),
    )


def _blocks(config: TransformerConfig, prefix: str, folder: str) -> Layout:
    block, ours = f"{prefix}encoder.layers.{{}}.", f"{folder}transformer/blocks/"
    linears = (e for path, name in _LINEARS for e in linear(block + name, ours + path))
    norms = (e for path, name in _NORMS for e in norm(block + name, ours + path))
    return for_layers(config.num_layers, (*linears, *norms))


def text_config_from_transformers(published: Mapping[str, Any]) -> ClipTextConfig:
    """The sizes that a config.json of a `CLIPTextModel` names; keys that say nothing about them are ignored.

    Raises:
      UserError: a size is missing, or a value is not one that a CLIP has.
    """
    eos_id = published.get("eos_token_id", _LEGACY_EOS_ID)
    return ClipTextConfig(
        transformer=_transformer(published),
        vocab_size=_size(published, "vocab_size"),
        length=_size(published, "max_position_embeddings"),
        eos_id=None if eos_id == _LEGACY_EOS_ID else eos_id,
    )


def config_from_transformers(published: Mapping[str, Any]) -> ClipConfig:
    """The sizes that a config.json of a `CLIPModel` names, with transformers' defaults where it is silent.

    Raises:
      UserError: a value is not one that a CLIP has.
    """
    text, vision = (
        {**defaults, **(published.get(f"{tower}_config") or {}), **(published.get(f"{tower}_config_dict") or {})}
        for tower, defaults in (("text", _TEXT_DEFAULTS), ("vision", _VISION_DEFAULTS))
    )
    if vision.get("num_channels", 3) != 3:
        raise UserError(f"config.json: num_channels is {vision['num_channels']}; CLIP sees 3")
    return ClipConfig(
        vision=ClipVisionConfig(_transformer(vision), vision["image_size"], vision["patch_size"]),
        text=text_config_from_transformers(text),
        dim=published.get("projection_dim", 512),
    )


def _transformer(published: Mapping[str, Any]) -> TransformerConfig:
    activation = published.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"config.json: hidden_act is {activation!r}; CLIP has one of {', '.join(ACTIVATIONS)}")
    if published.get("layer_norm_eps", 1e-5) != 1e-5:
        raise UserError(f"config.json: layer_norm_eps is {published['layer_norm_eps']}; CLIP has 1e-05")
    return TransformerConfig(
        width=_size(published, "hidden_size"),
        num_layers=_size(published, "num_hidden_layers"),
        num_heads=_size(published, "num_attention_heads"),
        mlp_dim=_size(published, "intermediate_size"),
        activation=activation,
    )


def _size(published: Mapping[str, Any], key: str) -> int:
    if key not in published:
        raise UserError(f"config.json: {key} is missing; a CLIP's has it")
    return published[key]
