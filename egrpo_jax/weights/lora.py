"""LoRA files as diffusers reads and writes them: `pytorch_lora_weights.safetensors`.

A layer's adapter is `transformer.{module}.lora_A.weight [r, in]` and `transformer.{module}.lora_B.weight [out, r]`; it
adds `alpha / r * B A` to the weight. Alpha is r unless a scalar `transformer.{module}.alpha`, or the configuration of
the adapter in the file's metadata, says otherwise. Modules are those of the base model's layout.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save

from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.errors import UserError
from egrpo_jax.weights.files import TensorFiles, open_tensors
from egrpo_jax.weights.layout import LINEAR, LINEAR_SWAPPED, Entry, Layout, Params

FILE_NAME = "pytorch_lora_weights.safetensors"
"""What `load_lora_weights` looks for in a folder."""

METADATA_KEY = "lora_adapter_metadata"
_PREFIX = "transformer."
_NAME = re.compile(rf"{re.escape(_PREFIX)}(.+)\.(lora_A\.weight|lora_B\.weight|alpha)")


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
            place = _place(e)
            a, b = (flat[f"{_layer_path(e)}/{name}"][place] for name in ("a", "b"))
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(e.form.to_published(b * scale))
    return tensors


def load_lora(path: str | os.PathLike[str], scale: float, layout: Layout, params: Mapping[str, Any]) -> Params:
    """Adapters from a file that diffusers or `save_lora` wrote.

    Args:
      path: of the file, or of a folder that holds it.
      scale: that the adapters will be applied with; B is divided by it.
      layout: of the base model, in diffusers' format.
      params: of the base model, or their `jax.ShapeDtypeStruct`; only shapes are looked at.

    Returns:
      As `init_lora` does: `{"a": [..., in, r], "b": [..., r, out]}`, float32. In a stack of layers r is the largest
      rank; zeros fill up smaller adapters and stand for layers without one, add nothing and get no gradient.

    Raises:
      UserError: no such file, one of another format or model, or one that holds more than LoRA.
    """
    path = Path(path)
    modules = _linear_modules(layout)
    flat = flatten_dict(params, sep="/")
    found: dict[str, list[tuple[Entry, np.ndarray, np.ndarray]]] = {}
    for module, (a, b) in _read_adapters(path).items():
        if module not in modules:
            raise UserError(f"{path}: {module} is no linear layer of the base model; take a LoRA made for it")
        e = modules[module]
        inputs, outputs = flat[f"{_layer_path(e)}/kernel"].shape[-2:]
        if (a.shape[1], b.shape[0]) != (inputs, outputs):
            raise UserError(
                f"{path}: {module} maps {a.shape[1]} to {b.shape[0]}, in the base model {inputs} to {outputs}; "
                "take a LoRA made for it"
            )
        found.setdefault(_layer_path(e), []).append((e, a.T, e.form.to_ours(b) / np.float32(scale)))
    return unflatten_dict(
        {tuple(layer.split("/")): _stack(found[layer], flat[f"{layer}/kernel"].shape) for layer in found}
    )


def _linear_modules(layout: Layout) -> dict[str, Entry]:
    """The weights of linear layers, by the published names of their modules."""
    return {
        e.name.removesuffix(".weight"): e
        for e in layout
        if e.name.endswith(".weight") and e.form in (LINEAR, LINEAR_SWAPPED) and len(e.leaves) == 1
    }


def _layer_path(e: Entry) -> str:
    return e.leaves[0].path.removesuffix("/kernel")


def _place(e: Entry) -> int | EllipsisType:
    """Index of the entry's layer in arrays that may have an axis for a stack of layers."""
    layer = e.leaves[0].layer
    return ... if layer is None else layer


def _stack(adapters: list[tuple[Entry, np.ndarray, np.ndarray]], kernel: tuple[int, ...]) -> Params:
    """`{"a", "b"}` of all the layers in a kernel's stack, from `a [in, r]` and `b [r, out]` of some."""
    *layers, inputs, outputs = kernel
    rank = max(a.shape[1] for _, a, _ in adapters)
    pair = {
        "a": np.zeros((*layers, inputs, rank), np.float32),
        "b": np.zeros((*layers, rank, outputs), np.float32),
    }
    for e, a, b in adapters:
        pair["a"][_place(e)][:, : a.shape[1]] = a
        pair["b"][_place(e)][: b.shape[0]] = b
    return pair


def _read_adapters(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A `[r, in]` and B `[out, r]`, multiplied by alpha / r, of each module in a file; float32."""
    files = open_tensors(path)
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name in files:
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"{path}: {name} is not part of a LoRA of a transformer, as diffusers writes it; the names must be "
                f"{_PREFIX}MODULE.lora_A.weight, .lora_B.weight or .alpha"
            )
        parts.setdefault(match[1], {})[match[2]] = files[name].astype(np.float32)
    config = _adapter_config(path, files)
    if config and any("alpha" in found for found in parts.values()):
        raise UserError(f"{path} has alphas both as tensors and in its metadata; there must be only one of them")
    return {module: _read_adapter(path, module, found, config) for module, found in parts.items()}


def _adapter_config(path: Path, files: TensorFiles) -> dict[str, Any]:
    """PEFT's configuration of the transformer's adapter, from the metadata of the file; empty if there is none."""
    first = next(iter(files.stored.values()))
    with safe_open(first.file, "numpy") as file:
        text = (file.metadata() or {}).get(METADATA_KEY, "{}")
    try:
        return {key.removeprefix(_PREFIX): value for key, value in json.loads(text).items() if key.startswith(_PREFIX)}
    except (ValueError, AttributeError):
        raise UserError(f"{path}: metadata {METADATA_KEY} is {text[:40]!r}, expected a JSON object") from None


def _read_adapter(
    path: Path, module: str, found: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    a, b = (found.get(f"lora_{letter}.weight") for letter in "AB")
    if a is None or b is None:
        raise UserError(f"{path}: {module} has only {', '.join(sorted(found))}; an adapter has lora_A and lora_B")
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
        raise UserError(f"{path}: {module} has lora_A {a.shape} and lora_B {b.shape}; expected [r, in] and [out, r]")
    rank = len(a)
    alpha = float(found["alpha"]) if "alpha" in found else _configured_alpha(config, module, rank)
    return a, b * np.float32(alpha / (np.sqrt(rank) if config.get("use_rslora") else rank))


def _configured_alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
    """PEFT's rule: the first of `alpha_pattern` that the end of the module's name matches, else `lora_alpha`."""
    patterns: Iterator[str] = iter(config.get("alpha_pattern") or ())
    special = next((pattern for pattern in patterns if re.fullmatch(rf"(.*\.)?({pattern})", module)), None)
    return config.get("lora_alpha", rank) if special is None else config["alpha_pattern"][special]
