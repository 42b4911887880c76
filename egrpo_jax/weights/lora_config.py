"""PEFT's configuration of an adapter: what its two matrices are multiplied by, and whether they are plain LoRA at all.

diffusers keeps it in the metadata of a file, PEFT in an `adapter_config.json` beside it. Only what a reader needs to
compute the same function is looked at; what says how the adapter was trained is not.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from egrpo_jax.common.errors import UserError, first_line
from egrpo_jax.weights.configs import read_object

METADATA_KEY = "lora_adapter_metadata"
_MODEL = "transformer."  # before every key of the metadata, as a pipeline writes it
_FILE_NAME = "adapter_config.json"
_DEFAULT_ALPHA = 8
"""PEFT's `LoraConfig().lora_alpha`."""
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base model's weights as they are."""
_OTHER_METHODS = (
    *("use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config"),
    *("alora_invocation_tokens", "layer_replication"),
)
"""Keys that, if set, make the two matrices mean something else."""
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The scale of each module's adapter.

    Attributes:
      source: what messages call that which it was read from.
      alpha: of modules that no key of `alphas` fits.
      alphas: of single modules, by regular expressions for the ends of their names (PEFT's `alpha_pattern`).
      rank: of modules that no key of `ranks` fits; None if nothing is said.
      ranks: of single modules (PEFT's `rank_pattern`).
      rank_stabilized: divide by the root of the rank instead of the rank (rsLoRA, arXiv:2312.03732).
    """

    source: str
    alpha: float
    alphas: Mapping[str, float]
    rank: float | None
    ranks: Mapping[str, float]
    rank_stabilized: bool

    def scale(self, module: str, rank: int) -> float:
        """The factor of `B A` of `module`.

        Raises:
          UserError: the configuration says that the module has another rank.
        """
        said = _first_fit(self.ranks, module, self.rank)
        if said is not None and said != rank:
            raise UserError(f"{self.source}: the rank of {module} is {said:g}, but its tensors have rank {rank}")
        return _first_fit(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilized else rank)


def config_in_metadata(file: Path) -> AdapterConfig | None:
    """The configuration in the metadata of a safetensors file; None if there is none.

    A pipeline writes its keys with the prefix `transformer.`, a transformer alone without.

    Raises:
      UserError: it is no JSON object, says nothing of the transformer, or cannot be followed.
    """
    source, text = f"{file}: metadata {METADATA_KEY}", _metadata(file).get(METADATA_KEY)
    if text is None:
        return None
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise UserError(f"{source} is {text[:40]!r}, expected a JSON object")
    prefixed = {key.removeprefix(_MODEL): value for key, value in fields.items() if key.startswith(_MODEL)}
    bare = {key: value for key, value in fields.items() if "." not in key}
    if bool(prefixed) == bool(bare):
        raise UserError(f"{source} is {text[:40]!r}, expected {_MODEL}lora_alpha and so on, or all without {_MODEL}")
    return _parse(source, prefixed or bare)


def _metadata(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "numpy") as opened:
            return opened.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{file} is not a safetensors file, or damaged ({first_line(error)})") from None


def config_in_folder(folder: Path) -> AdapterConfig | None:
    """The configuration in PEFT's `adapter_config.json`; None if there is no such file.

    Raises:
      UserError: it is no JSON object, or cannot be followed.
    """
    file = folder / _FILE_NAME
    return _parse(str(file), read_object(file)) if file.exists() else None


def positive(source: str, key: str, value: Any) -> float:
    """`value`, if it is a number that a float32 can multiply by. Raises UserError: it is something else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and _SMALLEST <= value <= _LARGEST:
        return float(value)
    raise UserError(f"{source}: {key} is {value!r}, expected a positive number")


def _parse(source: str, fields: Mapping[str, Any]) -> AdapterConfig:
    _check_method(source, fields)
    alpha, rank, stabilized = (fields.get(key) for key in ("lora_alpha", "r", "use_rslora"))
    if not isinstance(stabilized, bool | None):
        raise UserError(f"{source}: use_rslora is {stabilized!r}, expected true or false")
    return AdapterConfig(
        source,
        positive(source, "lora_alpha", _DEFAULT_ALPHA if alpha is None else alpha),
        _patterns(source, fields, "alpha_pattern"),
        None if rank is None else positive(source, "r", rank),
        _patterns(source, fields, "rank_pattern"),
        bool(stabilized),
    )


def _check_method(source: str, fields: Mapping[str, Any]) -> None:
    """Raises UserError: the adapter is not plain LoRA on the published weights."""
    kind, start = fields.get("peft_type"), fields.get("init_lora_weights")
    if kind not in (None, "LORA"):
        raise UserError(f"{source}: peft_type is {kind!r}, expected LORA; no other adapter can be loaded")
    if start not in _PLAIN_STARTS:
        raise UserError(
            f"{source}: init_lora_weights is {start!r}, which changes the base model too; expected an adapter saved "
            "with PEFT's path_initial_model_for_weight_conversion, which makes it plain LoRA"
        )
    for key in _OTHER_METHODS:
        if fields.get(key):
            raise UserError(f"{source}: {key} is {fields[key]!r}; only plain LoRA can be loaded, which does not set it")


def _patterns(source: str, fields: Mapping[str, Any], key: str) -> dict[str, float]:
    patterns = fields.get(key) or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{source}: {key} is {patterns!r}, expected an object from regular expressions to numbers")
    for pattern in patterns:
        try:
            re.compile(_ending(pattern))
        except (re.error, OverflowError):
            raise UserError(f"{source}: {key} has {pattern!r}, expected a regular expression") from None
    return {pattern: positive(source, f"{key} {pattern}", value) for pattern, value in patterns.items()}


def _ending(pattern: str) -> str:
    """The expression that a whole name must fit, by PEFT's rule: `pattern` is for some of its last parts."""
    return rf"(.*\.)?({pattern})"


def _first_fit(patterns: Mapping[str, float], module: str, otherwise: Any) -> Any:
    return next((value for pattern, value in patterns.items() if re.fullmatch(_ending(pattern), module)), otherwise)
