"""Z-Image transformers as they are published: the tensors of both file formats, and diffusers' config.json.

`diffusers` is the layout of Hugging Face repositories (`transformer/*.safetensors`), `original` that of single files,
whose names may begin with `PREFIX`; there queries, keys and values are joined by output rows. A patch is (row, column,
channel) in either, (channel, row, column) here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from egrpo_jax.models.z_image import ZImageConfig
from egrpo_jax.weights.configs import EVEN, POSITIVE, SIZE, Key, Published, list_of, one_of
from egrpo_jax.weights.layout import (
    LINEAR_PATCH_COLUMNS,
    LINEAR_PATCH_ROWS,
    PATCH_ROWS,
    Layout,
    entry,
    for_layers,
    kernel,
    linear,
)

Format = Literal["diffusers", "original"]

CLASS_NAME = "ZImageTransformer2DModel"
KEYS: Mapping[str, Key] = MappingProxyType(
    {
        "all_patch_size": Key(one_of([2]), [2]),
        "all_f_patch_size": Key(one_of([1]), [1]),
        "in_channels": Key(SIZE, 16),
        "dim": Key(SIZE, 3840),
        "n_layers": Key(SIZE, 30),
        "n_refiner_layers": Key(SIZE, 2),
        "n_heads": Key(SIZE, 30),
        "n_kv_heads": Key(SIZE, 30),
        "norm_eps": Key(POSITIVE, 1e-5),
        "qk_norm": Key(one_of(True), True),
        "cap_feat_dim": Key(SIZE, 2560),
        "siglip_feat_dim": Key(one_of(None), None),  # the models that take images as well have it
        "rope_theta": Key(POSITIVE, 256.0),
        "t_scale": Key(one_of(1000.0), 1000.0),
        "axes_dims": Key(list_of(EVEN, 3), [32, 48, 48]),
        "axes_lens": Key(list_of(SIZE, 3), [1024, 512, 512]),
    }
)
"""The keys of config.json."""

PREFIX = "model.diffusion_model."
IGNORED = (rf"({re.escape(PREFIX)})?norm_final\.weight",)
"""Patterns of whole names that single files have and no layer reads."""

_NORMS = (
    ("attention_norm_1", "attention_norm1"),
    ("attention_norm_2", "attention_norm2"),
    ("ff_norm_1", "ffn_norm1"),
    ("ff_norm_2", "ffn_norm2"),
)


def z_image_layout(config: ZImageConfig, fmt: Format, prefix: str = "") -> Layout:
    """The tensors of a Z-Image checkpoint of this size: 521 (diffusers) or 453 (original) for the published one.

    `prefix` is what stands before their names.
    """
    embedder, final = (
        ("all_x_embedder.2-1", "all_final_layer.2-1") if fmt == "diffusers" else ("x_embedder", "final_layer")
    )
    return (
        entry(f"{prefix}x_pad_token", "image_pad"),
        entry(f"{prefix}cap_pad_token", "text_pad"),
        entry(f"{prefix}{embedder}.weight", "image_in/kernel", form=LINEAR_PATCH_COLUMNS),
        entry(f"{prefix}{embedder}.bias", "image_in/bias"),
        *linear(f"{prefix}t_embedder.mlp.0", "time_in/linear_1"),
        *linear(f"{prefix}t_embedder.mlp.2", "time_in/linear_2"),
        entry(f"{prefix}cap_embedder.0.weight", "text_norm/scale"),
        *linear(f"{prefix}cap_embedder.1", "text_in"),
        *_stack("noise_refiner", config.num_refiner_layers, fmt, prefix),
        *_stack("context_refiner", config.num_refiner_layers, fmt, prefix),
        *_stack("layers", config.num_layers, fmt, prefix),
        *linear(f"{prefix}{final}.adaLN_modulation.1", "final_modulation/linear"),
        entry(f"{prefix}{final}.linear.weight", "final/kernel", form=LINEAR_PATCH_ROWS),
        entry(f"{prefix}{final}.linear.bias", "final/bias", form=PATCH_ROWS),
    )


def _stack(name: str, count: int, fmt: Format, prefix: str) -> Layout:
    """The blocks of a stack, which has one name in files and here."""
    ours, block = f"{name}/", f"{prefix}{name}.{{}}."
    modulation = () if name == "context_refiner" else linear(f"{block}adaLN_modulation.0", f"{ours}modulation")
    norms = (entry(f"{block}{theirs}.weight", f"{ours}{norm}/scale") for norm, theirs in _NORMS)
    feed_forward = (e for i in (1, 2, 3) for e in kernel(f"{block}feed_forward.w{i}", f"{ours}ff/linear_{i}"))
    attention = _attention(fmt, f"{block}attention.", ours)
    return for_layers(count, (*attention, *norms, *feed_forward, *modulation))


def _attention(fmt: Format, theirs: str, ours: str) -> Layout:
    heads = {x: f"{ours}qkv/to_{x}" for x in "qkv"}
    if fmt == "original":
        qkv, out, norm = kernel(f"{theirs}qkv", *heads.values()), "out", "{}_norm"
    else:
        qkv = tuple(e for x, path in heads.items() for e in kernel(f"{theirs}to_{x}", path))
        out, norm = "to_out.0", "norm_{}"
    norms = (entry(f"{theirs}{norm.format(x)}.weight", f"{ours}qkv/norm_{x}/scale") for x in "qk")
    return (*qkv, *kernel(f"{theirs}{out}", f"{ours}out"), *norms)


def config_from_diffusers(published: Published) -> ZImageConfig:
    """The sizes that a config.json of a `ZImageTransformer2DModel` names.

    Raises:
      UserError: an unknown key, or a value that no Z-Image transformer here has.
    """
    keys = published.checked(KEYS, strict=True)
    heads, dim = keys["n_heads"], keys["dim"]
    if dim % heads:
        raise keys.error("n_heads", f"a divisor of dim {dim}")
    if keys["n_kv_heads"] != heads:
        raise keys.error("n_kv_heads", f"n_heads, {heads}")
    if sum(keys["axes_dims"]) != dim // heads:
        raise keys.error("axes_dims", f"numbers that add up to dim / n_heads, {dim // heads}")
    return ZImageConfig(
        in_channels=4 * keys["in_channels"],
        num_layers=keys["n_layers"],
        num_refiner_layers=keys["n_refiner_layers"],
        num_heads=heads,
        head_dim=dim // heads,
        text_dim=keys["cap_feat_dim"],
        axes_dims=tuple(keys["axes_dims"]),
        axes_lens=tuple(keys["axes_lens"]),
        theta=keys["rope_theta"],
        epsilon=keys["norm_eps"],
    )


def config_to_diffusers(config: ZImageConfig) -> dict[str, Any]:
    """The content of config.json for `config`, `_class_name` included."""
    return {
        "_class_name": CLASS_NAME,
        "all_patch_size": [2],
        "all_f_patch_size": [1],
        "in_channels": config.in_channels // 4,
        "dim": config.width,
        "n_layers": config.num_layers,
        "n_refiner_layers": config.num_refiner_layers,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_heads,
        "norm_eps": config.epsilon,
        "qk_norm": True,
        "cap_feat_dim": config.text_dim,
        "siglip_feat_dim": None,
        "rope_theta": config.theta,
        "t_scale": 1000.0,
        "axes_dims": list(config.axes_dims),
        "axes_lens": list(config.axes_lens),
    }
