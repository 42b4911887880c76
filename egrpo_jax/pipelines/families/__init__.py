"""The families of published flow models, one file each, and what tells them apart: the folder's own config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from egrpo_jax.common.errors import UserError
from egrpo_jax.pipelines.families.base import Family, Format, Text, TextEncoder
from egrpo_jax.pipelines.families.flux import FLUX
from egrpo_jax.pipelines.families.flux2 import FLUX2
from egrpo_jax.pipelines.families.sd3 import SD3
from egrpo_jax.pipelines.families.z_image import Z_IMAGE
from egrpo_jax.weights.configs import read_object

FAMILIES: dict[str, Family] = {family.class_name: family for family in (FLUX, SD3, FLUX2, Z_IMAGE)}
"""By the class of the transformer."""


def family_of(folder: Path) -> Family:
    """The family of the pipeline in `folder`. Raises UserError: its transformer is of none, or is not there."""
    config = read_object(folder / "transformer" / "config.json")
    found = config.get("_class_name")
    if found not in FAMILIES:
        raise config.error("_class_name", " or ".join(FAMILIES))
    return FAMILIES[found]


def released(name: str) -> tuple[Family, Any]:
    """The family and the sizes of the published model that is called `name`. Raises UserError: it is not known."""
    for family in FAMILIES.values():
        for pattern, sizes in family.releases.items():
            if re.search(pattern, name.lower()):
                return family, sizes
    names = ", ".join(family.name for family in FAMILIES.values())
    raise UserError(f"{name} does not exist, and is not the name of a known model, of {names}")


__all__ = [
    "FAMILIES",
    "FLUX",
    "FLUX2",
    "SD3",
    "Z_IMAGE",
    "Family",
    "Format",
    "Text",
    "TextEncoder",
    "family_of",
    "released",
]
