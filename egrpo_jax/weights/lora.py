"""LoRA files and our adapters: written as diffusers does, read as any common program does (`weights/lora_files.py`).

A layer's adapter in a file is A `[r, in]` and B `[out, r]`; it adds `alpha / r * B A` to the weight. Alpha is r unless
the file, or the configuration beside it, says otherwise. Modules are those of the base model's layout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save

from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.errors import UserError
from egrpo_jax.weights.layout import (
    LINEAR,
    LINEAR_PATCH_COLUMNS,
    LINEAR_PATCH_ROWS,
    LINEAR_SWAPPED,
    Entry,
    Form,
    Layout,
    Leaf,
    Params,
)
from egrpo_jax.weights.lora_files import FILE_NAME as FILE_NAME
from egrpo_jax.weights.lora_files import Factors, read_adapters

_PREFIX = "transformer."
_FORMS: Mapping[Form, tuple[Form, Form]] = {
    LINEAR: (LINEAR, LINEAR),
    LINEAR_SWAPPED: (LINEAR, LINEAR_SWAPPED),
    LINEAR_PATCH_ROWS: (LINEAR, LINEAR_PATCH_ROWS),
    LINEAR_PATCH_COLUMNS: (LINEAR_PATCH_COLUMNS, LINEAR),
}
"""The forms of A and B by that of the weight of a linear layer, `[out, in]` in files."""


def save_lora(path: str | os.PathLike[str], lora: Mapping[str, Any], scale: float, layout: Layout) -> None:
    """Writes adapters as `export_lora` gives them, all or nothing.

    Raises:
      UserError: a layer has no counterpart in diffusers' model, or the file cannot be written.
    """
    atomic_write(path, save(export_lora(lora, scale, layout), metadata={"format": "pt"}))


def export_lora(lora: Mapping[str, Any], scale: float, layout: Layout) -> dict[str, np.ndarray]:
    """The float32 tensors, by name, that diffusers' `load_lora_weights` takes.

    Args:
      lora: as `init_lora` makes it.
      scale: alpha / rank; goes into B, so that a reader needs to know nothing of it.
      layout: of the base model, in diffusers' format.

    Raises:
      UserError: a layer has no counterpart in diffusers' model.
    """
    flat = {path: np.asarray(array, np.float32) for path, array in flatten_dict(lora, sep="/").items()}
    modules = _linear_modules(layout)
    unknown = {path.rpartition("/")[0] for path in flat} - {_layer_path(e) for e in modules.values()}
    if unknown:
        raise UserError(f"adapters of {', '.join(sorted(unknown))}: the published model has no such linear layers")
    tensors = {}
    for module, e in modules.items():
        if f"{_layer_path(e)}/a" in flat:
            index = _index(e.leaves[0].layer)
            a, b = (flat[f"{_layer_path(e)}/{name}"][index] for name in ("a", "b"))
            form_a, form_b = _FORMS[e.form]
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(form_a.to_published(a))
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(form_b.to_published(b * scale))
    return tensors


def load_lora(path: str | os.PathLike[str], scale: float, layout: Layout, params: Mapping[str, Any]) -> Params:
    """Adapters from a file that diffusers, PEFT, kohya's scripts, ComfyUI or `save_lora` wrote.

    The adapters compute what they do in the program that wrote them, and keep the ranks and the layers of the file;
    layers that are joined in the file, such as queries, keys and values, get adapters of their own.

    Args:
      path: of the file, or of a folder that holds it.
      scale: that the adapters will be applied with; B is divided by it.
      layout: of the base model; the layouts of all formats whose names may be in the file, one after another.
      params: of the base model, or their `jax.ShapeDtypeStruct`; only shapes are looked at.

    Returns:
      As `init_lora` does: `{"a": [..., in, r], "b": [..., r, out]}`, float32. In a stack of layers r is the largest
      rank; zeros fill up smaller adapters and stand for layers without one, add nothing and get no gradient.

    Raises:
      UserError: no such file, one of another format or model, or one that holds more than LoRA.
    """
    path = Path(path)
    modules = _linear_modules(layout)
    modules |= {module.replace(".", "_"): e for module, e in modules.items()}
    flat = flatten_dict(params, sep="/")
    found: dict[str, dict[int | None, Factors]] = {}
    for module, (a, b) in read_adapters(path).items():
        if module not in modules:
            raise UserError(f"{path}: {module} is no linear layer of the base model; take a LoRA made for it")
        e = modules[module]
        _check_shapes(path, module, (a, b), [flat[leaf.path].shape for leaf in e.leaves])
        for leaf, (own_a, own_b) in _split(e, a, b, [flat[leaf.path].shape[-1] for leaf in e.leaves]):
            layers = found.setdefault(leaf.path.removesuffix("/kernel"), {})
            if leaf.layer in layers:
                raise UserError(f"{path} mixes two layouts: {module} is there under another name too; expected one")
            form_a, form_b = _FORMS[e.form]
            layers[leaf.layer] = form_a.to_ours(own_a), form_b.to_ours(own_b) / np.float32(scale)
    return unflatten_dict({layer: _stack(found[layer], flat[f"{layer}/kernel"].shape) for layer in found}, sep="/")


def linear_layers(layout: Layout) -> set[str]:
    """Our paths of the layers that are linear in the published model too: those whose adapters a file can hold."""
    return {leaf.path.removesuffix("/kernel") for e in _linear_modules(layout).values() for leaf in e.leaves}


def _linear_modules(layout: Layout) -> dict[str, Entry]:
    """The weights of linear layers, by the published names of their modules."""
    return {e.name.removesuffix(".weight"): e for e in layout if e.name.endswith(".weight") and e.form in _FORMS}


def _layer_path(e: Entry) -> str:
    return e.leaves[0].path.removesuffix("/kernel")


def _index(layer: int | None) -> int | EllipsisType:
    """Index of a layer in arrays that may have an axis for a stack of layers."""
    return ... if layer is None else layer


def _check_shapes(path: Path, module: str, factors: Factors, kernels: Sequence[tuple[int, ...]]) -> None:
    """Raises UserError: A or B does not fit the kernels that a module joins."""
    inputs, outputs = kernels[0][-2], sum(kernel[-1] for kernel in kernels)
    a, b = factors
    if (a.shape[1], b.shape[0]) != (inputs, outputs):
        raise UserError(
            f"{path}: {module} maps {a.shape[1]} to {b.shape[0]}, in the base model {inputs} to {outputs}; "
            "take a LoRA made for it"
        )


def _split(e: Entry, a: np.ndarray, b: np.ndarray, rows: Sequence[int]) -> Iterator[tuple[Leaf, Factors]]:
    """A and B of each of our layers that a module joins by `rows` of B.

    They share A, unless B is block-diagonal: so kohya's `split_qkv` joins adapters that were trained apart.
    """
    parts = np.split(b, np.cumsum(rows)[:-1])
    chunk, rest = divmod(len(a), len(parts))
    blocks = [slice(chunk * i, chunk * (i + 1)) for i in range(len(parts))]
    if rest or any(np.delete(part, block, axis=1).any() for part, block in zip(parts, blocks, strict=True)):
        blocks = [slice(None)] * len(parts)
    for leaf, part, block in zip(e.leaves, parts, blocks, strict=True):
        yield leaf, (a[block], part[:, block])


def _stack(adapters: Mapping[int | None, Factors], kernel: tuple[int, ...]) -> Params:
    """`{"a", "b"}` of all the layers in a kernel's stack, from `a [in, r]` and `b [r, out]` of some."""
    *layers, inputs, outputs = kernel
    rank = max(a.shape[1] for a, _ in adapters.values())
    pair = {
        "a": np.zeros((*layers, inputs, rank), np.float32),
        "b": np.zeros((*layers, rank, outputs), np.float32),
    }
    for layer, (a, b) in adapters.items():
        pair["a"][_index(layer)][:, : a.shape[1]] = a
        pair["b"][_index(layer)][: b.shape[0]] = b
    return pair
