"""Parameters of the built-in rewards, with their default files, as shapes: known before a file is there."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from egrpo_jax.models.blip import Blip, BlipConfig
from egrpo_jax.models.clip import Clip, ClipConfig
from egrpo_jax.parallel.rules import with_shardings
from egrpo_jax.rewards import imagereward
from egrpo_jax.rewards.batched import SCORER_RULES
from egrpo_jax.rewards.clip_files import clip_shapes

_VIT_H_14 = ("hpsv2.1", "hpsv2.0", "clip_score", "pickscore")
_ON_THE_HOST = ("ocr", "jpeg_compressibility", "jpeg_incompressibility")


def scorer_params(name: str, dtype: str, mesh: Mesh) -> Any:
    """The parameters of a built-in reward, as `jax.ShapeDtypeStruct` that lie on `mesh`; None where unknown."""
    of_type = jnp.dtype(dtype)
    if name in _VIT_H_14:
        return with_shardings(mesh, SCORER_RULES, clip_shapes(Clip(ClipConfig(), of_type, of_type)))
    if name == "imagereward":
        return imagereward.abstract_params(Blip(BlipConfig(), of_type, of_type), mesh)
    return {} if name in _ON_THE_HOST else None
