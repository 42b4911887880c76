"""CLIP as it is published by open_clip, HPSv2 among them: a flat state dict, and open_clip_config.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.clip import Activation, ClipConfig, ClipTextConfig, ClipVisionConfig, TransformerConfig
from egrpo_jax.weights.layout import CONV, LINEAR, Layout, entry, for_layers, linear, norm

FILE = "open_clip_config.json"

_MODEL = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
_VISION = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0}
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "layers": 12, "heads": 8, "mlp_ratio": 4.0}
# What counts where the file is silent; a key beyond these is of another kind of model.


def open_clip_layout(config: ClipConfig) -> Layout:
    """The tensors of a state dict of this size, 686 for ViT-H-14."""
    return (
        entry("visual.class_embedding", "vision/class_token"),
        entry("visual.conv1.weight", "vision/patches/kernel", form=CONV),
        entry("visual.positional_embedding", "vision/positions"),
        *norm("visual.ln_pre", "vision/first_norm"),
        *_blocks(config.vision.transformer, "visual.", "vision/"),
        *norm("visual.ln_post", "vision/final_norm"),
        entry("visual.proj", "image_projection/kernel"),
        entry("token_embedding.weight", "text/tokens/embedding"),
        entry("positional_embedding", "text/positions"),
        *_blocks(config.text.transformer, "", "text/"),
        *norm("ln_final", "text/final_norm"),
        entry("text_projection", "text_projection/kernel"),
        entry("logit_scale", "logit_scale"),
    )


def _blocks(config: TransformerConfig, prefix: str, folder: str) -> Layout:
    block, ours = f"{prefix}transformer.resblocks.{{}}.", f"{folder}transformer/blocks/"
    qkv = [f"{ours}{name}" for name in ("to_q", "to_k", "to_v")]
    entries = (
        *norm(f"{block}ln_1", f"{ours}attention_norm"),
        entry(f"{block}attn.in_proj_weight", *(f"{path}/kernel" for path in qkv), form=LINEAR),
        entry(f"{block}attn.in_proj_bias", *(f"{path}/bias" for path in qkv)),
        *linear(f"{block}attn.out_proj", f"{ours}out"),
        *norm(f"{block}ln_2", f"{ours}mlp_norm"),
        *linear(f"{block}mlp.c_fc", f"{ours}mlp_1"),
        *linear(f"{block}mlp.c_proj", f"{ours}mlp_2"),
    )
    return for_layers(config.num_layers, entries)


def config_from_open_clip(published: Mapping[str, Any]) -> ClipConfig:
    """The sizes that the `model_cfg` of an open_clip_config.json names, with open_clip's defaults where it is silent.

    Raises:
      UserError: it is of a model of another kind.
    """
    _check_known("model_cfg", published, _MODEL)
    for key in ("embed_dim", "vision_cfg", "text_cfg"):
        if key not in published:
            raise UserError(f"{FILE}: {key} is missing in model_cfg; a CLIP's has it")
    _check_known("vision_cfg", published["vision_cfg"], _VISION)
    _check_known("text_cfg", published["text_cfg"], _TEXT)
    vision, text = {**_VISION, **published["vision_cfg"]}, {**_TEXT, **published["text_cfg"]}
    activation: Activation = "quick_gelu" if published.get("quick_gelu") else "gelu"
    return ClipConfig(
        vision=ClipVisionConfig(
            _transformer(vision, vision["width"] // vision["head_width"], activation),
            vision["image_size"],
            vision["patch_size"],
        ),
        text=ClipTextConfig(_transformer(text, text["heads"], activation), text["vocab_size"], text["context_length"]),
        dim=published["embed_dim"],
    )


def _transformer(published: Mapping[str, Any], heads: int, activation: Activation) -> TransformerConfig:
    width = published["width"]
    return TransformerConfig(width, published["layers"], heads, int(width * published["mlp_ratio"]), activation)


def _check_known(section: str, published: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = sorted(published.keys() - set(known))
    if unknown:
        listed = ", ".join(sorted(known))
        raise UserError(f"{FILE}: {section} has {', '.join(unknown)}; one of two plain transformers has {listed}")
