"""LoRA files as other programs write them, read into one form: A and B by the name of the module that they adapt.

    transformer.MODULE.lora_A.weight, .lora_B.weight         diffusers' pipelines; older ones .lora.down, .lora.up
    MODULE.lora_A.weight, ...                                diffusers' transformers alone
    base_model.model.MODULE.lora_A.weight, ...               PEFT, with an adapter_config.json
    diffusion_model.MODULE.lora_A.weight, ...                ComfyUI
    lora_unet_MODULE.lora_down.weight, .lora_up.weight       kohya's sd-scripts; '_' for '.' in MODULE
    lora_transformer_MODULE.lora_down.weight, .lora_up       OneTrainer, likewise

and MODULE.alpha in any of them. Modules are called as in diffusers' layout of the base model, or as in its original.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.errors import UserError
from egrpo_jax.weights.files import TensorFiles, open_tensors
from egrpo_jax.weights.lora_config import AdapterConfig, config_in_folder, config_in_metadata, positive

FILE_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers' `load_lora_weights` looks for in a folder."""
_PEFT_FILE_NAME = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."

_PARTS: Mapping[str, tuple[str, str | None]] = {
    "lora_A.weight": ("A", "lora_A and lora_B"),
    "lora_B.weight": ("B", "lora_A and lora_B"),
    "lora_down.weight": ("A", "lora_down and lora_up"),
    "lora_up.weight": ("B", "lora_down and lora_up"),
    "lora.down.weight": ("A", "lora.down and lora.up"),
    "lora.up.weight": ("B", "lora.down and lora.up"),
    "alpha": ("alpha", None),
}
"""How a tensor's name ends: what it is, and to which way of naming A and B that belongs."""
_NAME = re.compile(
    rf"(?P<prefix>transformer\.|{re.escape(_PEFT_PREFIX)}|diffusion_model\.|lora_unet_|lora_transformer_|)"
    rf"(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})"
)
_EXPECTED = "expected MODULE.lora_A.weight and MODULE.lora_B.weight, or lora_down and lora_up"

_FOREIGN: Mapping[str, str] = {
    r"text_encoder|lora_te\d?_": "an adapter of a text encoder; only those of the transformer can be loaded",
    r".*(lora_magnitude_vector|dora_scale)": "part of DoRA; only plain LoRA can be loaded",
    r".*\.hada_": "part of LoHa; only plain LoRA can be loaded",
    r".*\.lokr_": "part of LoKr; only plain LoRA can be loaded",
    r".*\.lora_mid\.": "part of a Tucker decomposition; only plain LoRA can be loaded",
    r".*\.(diff|diff_b|set_weight)$": "a whole tensor, no low-rank one; only plain LoRA can be loaded",
    r".*\.processor\.": "in the layout of attention processors (XLabs); convert the file to that of diffusers",
    r".*(query|key)_norm\.scale": "a norm, as in a LoRA for control; only plain LoRA can be loaded",
    r".*lora[._](A|B|down|up)\.bias": "a bias (lora_bias); only adapters of two matrices, A and B, can be loaded",
}
"""Tensors of other kinds of adapters: how their names begin, and what to say of them."""

Factors = tuple[np.ndarray, np.ndarray]


def read_adapters(path: Path) -> dict[str, Factors]:
    """A `[r, in]` and B `[out, r]`, multiplied by alpha / r, of each module in a file; float32.

    Args:
      path: of the file, or of a folder that holds it.

    Raises:
      UserError: no such file, one of another format, or one that holds more than LoRA.
    """
    files = open_tensors(_choose_file(path))
    if not files:
        raise UserError(f"{path} holds no tensors; {_EXPECTED}")
    file = next(iter(files.stored.values())).file
    names = {name: _parse_name(file, name) for name in files}
    _check_one_layout(file, names)
    modules: dict[str, dict[str, str]] = {}
    for name, match in names.items():
        modules.setdefault(match["module"], {})[_PARTS[match["part"]][0]] = name
    config = _find_config(file, names)
    return {module: _read_adapter(files, file, module, found, config) for module, found in modules.items()}


def _choose_file(path: Path) -> Path:
    """The file of adapters in a folder, if only one has a usual name; else `path` itself."""
    if not path.is_dir():
        return path
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{path} has no {FILE_NAME} or {_PEFT_FILE_NAME}; give the folder or the file of a LoRA")
    usual = [path / name for name in (FILE_NAME, _PEFT_FILE_NAME) if (path / name).is_file()]
    return usual[0] if len(usual) == 1 else path


def _parse_name(file: Path, name: str) -> re.Match[str]:
    for pattern, what in _FOREIGN.items():
        if re.match(pattern, name):
            raise UserError(f"{file}: {name} is {what}")
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(f"{file}: {name} is not part of a LoRA of a transformer; {_EXPECTED}")
    return match


def _check_one_layout(file: Path, names: Mapping[str, re.Match[str]]) -> None:
    """Raises UserError: names begin in two ways, or A and B are called in two ways."""
    prefixes = {match["prefix"]: name for name, match in names.items()}
    styles = {_PARTS[match["part"]][1]: name for name, match in names.items() if match["part"] != "alpha"}
    for first in (prefixes, styles):
        if len(first) > 1:
            one, other, *_ = first.values()
            raise UserError(f"{file} mixes two layouts: {one} and {other}; expected one of them throughout")


def _find_config(file: Path, names: Mapping[str, re.Match[str]]) -> AdapterConfig | None:
    """The one configuration that goes with a file, if any; a file may have alphas as tensors instead."""
    alphas = next((name for name, match in names.items() if match["part"] == "alpha"), None)
    is_peft = any(match["prefix"] == _PEFT_PREFIX for match in names.values())
    configs = [config_in_metadata(file), config_in_folder(file.parent) if is_peft else None]
    found = [config for config in configs if config is not None]
    sources = [config.source for config in found] + ([] if alphas is None else [f"{file}: {alphas}"])
    if len(sources) > 1:
        raise UserError(f"alphas are both in {sources[0]} and in {sources[1]}; expected only one of them")
    return found[0] if found else None


def _read_adapter(
    files: TensorFiles, file: Path, module: str, found: Mapping[str, str], config: AdapterConfig | None
) -> Factors:
    if "A" not in found or "B" not in found:
        raise UserError(f"{file}: {module} has only {', '.join(sorted(found.values()))}; {_EXPECTED}")
    a, b = (_read_factor(files, file, found[letter]) for letter in "AB")
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
        raise UserError(
            f"{file}: {module} has lora_A {a.shape} and lora_B {b.shape}, expected [r, in] and [out, r], r at least 1"
        )
    if "alpha" in found:
        scale = _read_alpha(files, file, found["alpha"]) / len(a)
    else:
        scale = 1.0 if config is None else config.scale(module, len(a))
    return a, b * np.float32(scale)


def _read_factor(files: TensorFiles, file: Path, name: str) -> np.ndarray:
    tensor = files[name]
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(f"{file}: {name} is of type {tensor.dtype}, expected floating-point numbers")
    tensor = tensor.astype(np.float32)
    if not np.isfinite(tensor).all():
        raise UserError(f"{file}: {name} has values that are infinite or not a number; the adapter is broken")
    return tensor


def _read_alpha(files: TensorFiles, file: Path, name: str) -> float:
    """Alpha, in an array of any number of dimensions."""
    alpha = files[name]
    if alpha.size != 1:
        raise UserError(f"{file}: {name} is of shape {alpha.shape}, expected one number")
    return positive(str(file), name, float(alpha.reshape(()).astype(np.float32)))
