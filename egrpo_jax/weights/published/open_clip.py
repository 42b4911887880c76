"""CLIP as it is published by open_clip, HPSv2 among them: a flat state dict, and open_clip_config.json."""

from __future__ import annotations

from egrpo_jax.models.clip import Activation, ClipConfig, ClipTextConfig, ClipVisionConfig, TransformerConfig
from egrpo_jax.weights.configs import FLAG, LARGEST, OBJECT, POSITIVE, SIZE, Key, Published, nullable
from egrpo_jax.weights.layout import CONV, LINEAR, Layout, entry, for_layers, linear, norm

FILE = "open_clip_config.json"

_MODEL = {
    "embed_dim": Key(SIZE),
    "quick_gelu": Key(nullable(FLAG), False),
    "vision_cfg": Key(OBJECT),
    "text_cfg": Key(OBJECT),
}
_VISION = {
    "image_size": Key(SIZE, 224),
    "patch_size": Key(SIZE, 16),
    "width": Key(SIZE, 768),
    "layers": Key(SIZE, 12),
    "head_width": Key(SIZE, 64),
    "mlp_ratio": Key(POSITIVE, 4.0),
}
_TEXT = {
    "context_length": Key(SIZE, 77),
    "vocab_size": Key(SIZE, 49408),
    "width": Key(SIZE, 512),
    "layers": Key(SIZE, 12),
    "heads": Key(SIZE, 8),
    "mlp_ratio": Key(POSITIVE, 4.0),
}
# A key beyond these is of another kind of model than two plain transformers.


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


def config_from_open_clip(published: Published) -> ClipConfig:
    """The sizes that the `model_cfg` of an open_clip_config.json names, with open_clip's defaults where it is silent.

    Raises:
      UserError: it is of a model of another kind.
    """
    keys = published.checked(_MODEL, strict=True)
    vision = keys.section("vision_cfg").checked(_VISION, strict=True)
    text = keys.section("text_cfg").checked(_TEXT, strict=True)
    for tower, key, fits in (
        (vision, "head_width", vision["width"] % vision["head_width"] == 0),
        (text, "heads", text["width"] % text["heads"] == 0),
    ):
        if not fits:
            raise tower.error(key, f"a divisor of width {tower['width']}")
    if vision["patch_size"] > vision["image_size"]:
        raise vision.error("patch_size", f"at most image_size {vision['image_size']}")
    activation: Activation = "quick_gelu" if keys["quick_gelu"] else "gelu"
    return ClipConfig(
        vision=ClipVisionConfig(
            _transformer(vision, vision["width"] // vision["head_width"], activation),
            vision["image_size"],
            vision["patch_size"],
        ),
        text=ClipTextConfig(_transformer(text, text["heads"], activation), text["vocab_size"], text["context_length"]),
        dim=keys["embed_dim"],
    )


def _transformer(keys: Published, heads: int, activation: Activation) -> TransformerConfig:
    mlp_dim = keys["width"] * keys["mlp_ratio"]
    if not 1 <= mlp_dim <= LARGEST:
        raise keys.error("mlp_ratio", f"such that times width {keys['width']} it is a size")
    return TransformerConfig(keys["width"], keys["layers"], heads, int(mlp_dim), activation)
