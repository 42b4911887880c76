"""CLIP as it is published by transformers: the tensors of `CLIPModel`, `CLIPTextModel` and
`CLIPTextModelWithProjection`, and their config.json.

Published files of `CLIPTextModel` spell names with `text_model.` in front; those that transformers 5 writes do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from egrpo_jax.models.clip import ACTIVATIONS, ClipConfig, ClipTextConfig, ClipVisionConfig, TransformerConfig
from egrpo_jax.weights.configs import SIZE, TOKEN_ID, Key, Published, one_of
from egrpo_jax.weights.layout import CONV, LINEAR, Layout, entry, for_layers, linear, norm

PREFIX = "text_model."
IGNORED = (r"((text|vision)_model\.)?embeddings\.position_ids",)
"""Patterns of whole names that older files have and no parameter is in: the numbers of the positions."""

LEGACY_EOS_ID = 2
"""The `eos_token_id` of configs that mean the position of the highest id."""

_LINEARS = (
    ("to_q", "self_attn.q_proj"),
    ("to_k", "self_attn.k_proj"),
    ("to_v", "self_attn.v_proj"),
    ("out", "self_attn.out_proj"),
    ("mlp_1", "mlp.fc1"),
    ("mlp_2", "mlp.fc2"),
)
_NORMS = (("attention_norm", "layer_norm1"), ("mlp_norm", "layer_norm2"))

_TRANSFORMER = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), Key(SIZE)),
    "hidden_act": Key(one_of(*ACTIVATIONS), "quick_gelu"),
    "layer_norm_eps": Key(one_of(1e-5), 1e-5),
}
_TEXT = {
    **_TRANSFORMER,
    "vocab_size": Key(SIZE),
    "max_position_embeddings": Key(SIZE),
    "eos_token_id": Key(TOKEN_ID, LEGACY_EOS_ID),
}
_PROJECTION = {"projection_dim": Key(SIZE, 512)}
_VISION = {**_TRANSFORMER, "image_size": Key(SIZE), "patch_size": Key(SIZE), "num_channels": Key(one_of(3), 3)}

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
    """The prefix with which a file spells its tensors: `"text_model."` or `""`, whatever stands before their names."""
    return PREFIX if any(name.startswith(PREFIX) for name in names) else ""


def clip_text_layout(config: ClipTextConfig, prefix: str = PREFIX, folder: str = "") -> Layout:
    """The tensors of a text encoder of this size: 196 for CLIP-L, 197 with a projection.

    `prefix` is what stands before their names but the projection's; `folder`, such as "text/", before our paths.
    """
    projection = (entry("text_projection.weight", f"{folder}text_projection/kernel", form=LINEAR),)
    return (
        entry(f"{prefix}embeddings.token_embedding.weight", f"{folder}tokens/embedding"),
        entry(f"{prefix}embeddings.position_embedding.weight", f"{folder}positions"),
        *_blocks(config.transformer, prefix, folder),
        *norm(f"{prefix}final_layer_norm", f"{folder}final_norm"),
        *(projection if config.projection_dim is not None else ()),
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


def text_config_from_transformers(published: Published) -> ClipTextConfig:
    """The sizes that a config.json of a `CLIPTextModel` names; keys that say nothing about them are ignored.

    Raises:
      UserError: a size is missing, or a value is not one that a CLIP has.
    """
    keys = published.checked(_TEXT)
    return ClipTextConfig(
        transformer=_transformer(keys),
        vocab_size=keys["vocab_size"],
        length=keys["max_position_embeddings"],
        eos_id=None if keys["eos_token_id"] == LEGACY_EOS_ID else keys["eos_token_id"],
    )


def projected_text_config_from_transformers(published: Published) -> ClipTextConfig:
    """The sizes that a config.json of a `CLIPTextModelWithProjection` names; as `text_config_from_transformers`."""
    dim = published.checked(_PROJECTION)["projection_dim"]
    return dataclasses.replace(text_config_from_transformers(published), projection_dim=dim)


def config_from_transformers(published: Published) -> ClipConfig:
    """The sizes that a config.json of a `CLIPModel` names, with transformers' defaults where it is silent.

    Raises:
      UserError: a value is not one that a CLIP has.
    """
    vision = _tower(published, "vision", _VISION_DEFAULTS).checked(_VISION)
    if vision["patch_size"] > vision["image_size"]:
        raise vision.error("patch_size", f"at most image_size {vision['image_size']}")
    return ClipConfig(
        vision=ClipVisionConfig(_transformer(vision), vision["image_size"], vision["patch_size"]),
        text=text_config_from_transformers(_tower(published, "text", _TEXT_DEFAULTS)),
        dim=published.checked(_PROJECTION)["projection_dim"],
    )


def _tower(published: Published, name: str, defaults: Mapping[str, int]) -> Published:
    """The section of a tower; in old files a second one, with `_dict` after its name, counts more."""
    section, older = published.section(f"{name}_config"), published.section(f"{name}_config_dict")
    return Published({**defaults, **section, **older}, section.file, section.prefix)


def _transformer(keys: Published) -> TransformerConfig:
    width, heads = keys["hidden_size"], keys["num_attention_heads"]
    if width % heads:
        raise keys.error("num_attention_heads", f"a divisor of hidden_size {width}")
    return TransformerConfig(
        width=width,
        num_layers=keys["num_hidden_layers"],
        num_heads=heads,
        mlp_dim=keys["intermediate_size"],
        activation=keys["hidden_act"],
    )
