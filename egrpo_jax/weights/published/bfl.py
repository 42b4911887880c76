"""Tables of names that transformers by Black Forest Labs have in common, in two file formats.

`diffusers` is the layout of Hugging Face repositories (`transformer/*.safetensors`), `bfl` that of the original single
files.
"""

from __future__ import annotations

from typing import Literal

from egrpo_jax.weights.layout import Layout, for_layers
from egrpo_jax.weights.published.names import Make, Names, scale, tensors

Format = Literal["diffusers", "bfl"]

_STACKS: dict[Format, dict[str, str]] = {
    "diffusers": {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"},
    "bfl": {"double_blocks": "double_blocks", "single_blocks": "single_blocks"},
}

JOINT_ATTENTION: Names = (
    ("image_qkv/to_q image_qkv/to_k image_qkv/to_v", "attn.to_q attn.to_k attn.to_v", "img_attn.qkv"),
    ("text_qkv/to_q text_qkv/to_k text_qkv/to_v", "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "txt_attn.qkv"),
    ("image_out", "attn.to_out.0", "img_attn.proj"),
    ("text_out", "attn.to_add_out", "txt_attn.proj"),
)
"""The linear layers of a double block's attention."""
JOINT_ATTENTION_SCALES: Names = (
    ("image_qkv/norm_q/scale", "attn.norm_q.weight", "img_attn.norm.query_norm.scale"),
    ("image_qkv/norm_k/scale", "attn.norm_k.weight", "img_attn.norm.key_norm.scale"),
    ("text_qkv/norm_q/scale", "attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale"),
    ("text_qkv/norm_k/scale", "attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale"),
)
"""Its norms."""


def stack(path: str, count: int, layers: Names, scales: Names, fmt: Format, make: Make) -> Layout:
    """All tensors of `count` blocks of `layers` and `scales`, ours at `path`."""
    inside = {"folder": f"{path}/", "prefix": f"{_STACKS[fmt][path]}.{{}}."}
    block = (*tensors(layers, fmt, make, **inside), *tensors(scales, fmt, scale, **inside))
    return for_layers(count, block)
