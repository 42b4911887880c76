"""Destinations of sampled images: one sheet of all, or a folder that an interrupted job goes on with.

Either is told first whether it can be written, then takes uint8 images a batch at a time, and keeps no more of them in
memory than the thumbnails of a sheet.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.errors import UserError, first_line
from egrpo_jax.evaluation.history import even_indices
from egrpo_jax.figures.grids import FORMATS, grid, save_image, shrink
from egrpo_jax.run.workdir import describe, differences

SHOWN = 256
"""Most images on a sheet."""
_SHEET_SIDE = 4096
"""About the most pixels of a sheet's side; images are shrunk to fit."""


class Samples(Protocol):
    """A destination of the images of a list of prompts."""

    def begin(self, settings: Mapping[str, Any]) -> int:
        """Records how the images are made; returns the index of the first that is not there yet."""

    def add(self, first: int, images: np.ndarray) -> None:
        """Takes uint8 `images [B, H, W, 3]`, those of the prompts from index `first` on."""

    def finish(self) -> None:
        """Writes what is made of all images together."""


def open_samples(out: Path, prompts: Sequence[str]) -> Samples:
    """The sheet, where `out` ends as an image does, or the folder. Raises UserError if `out` cannot be written."""
    ending = out.suffix.lower()
    if ending in FORMATS:
        return Sheet(out, prompts)
    if ending in Image.registered_extensions():
        raise UserError(f"--out={out}: expected one of the endings {', '.join(FORMATS)}, or a folder")
    return Folder(out, prompts)


class Sheet:
    """One image file of all images, each above its prompt."""

    def __init__(self, out: Path, prompts: Sequence[str]):
        """Raises UserError if there are too many prompts, or `out` cannot be written."""
        if len(prompts) > SHOWN:
            raise UserError(f"--out={out}: a sheet holds {SHOWN} images, found {len(prompts)} prompts; name a folder")
        _check_writable(out, out.parent)
        if out.is_dir():
            raise UserError(f"cannot write {out}: it is a folder")
        self._out, self._prompts, self._thumbnails = out, prompts, list[np.ndarray]()

    def begin(self, settings: Mapping[str, Any]) -> int:
        """Returns 0: a sheet is written at the end, whole, and says nothing of `settings`."""
        del settings
        return 0

    def add(self, first: int, images: np.ndarray) -> None:
        """Takes uint8 `images [B, H, W, 3]`, which come in the order of the prompts."""
        del first
        self._thumbnails += _thumbnails(images, len(self._prompts))

    def finish(self) -> None:
        """Writes the sheet."""
        save_image(_sheet(self._thumbnails, self._prompts), self._out)


class Folder:
    """An image for each prompt, `samples.json`, which says how they are made, and at the end `grid.png`."""

    def __init__(self, out: Path, prompts: Sequence[str]):
        """Raises UserError if `out` cannot be written."""
        _check_writable(out, out)
        self._out, self._prompts = out, prompts
        self._files = [out / f"{index:05d}.png" for index in range(len(prompts))]

    def begin(self, settings: Mapping[str, Any]) -> int:
        """Writes `samples.json`; returns the number of images that were there already.

        Raises:
          UserError: the folder holds anything but images that were begun with the same settings and prompts.
        """
        pairs = zip(self._prompts, self._files, strict=True)
        samples = [{"prompt": prompt, "file": file.name} for prompt, file in pairs]
        text = json.dumps({**settings, "samples": samples}, indent=2, ensure_ascii=False) + "\n"
        if self._out.is_dir() and any(not path.name.startswith(".") for path in self._out.iterdir()):
            self._compare(json.loads(text))
            return next((index for index, file in enumerate(self._files) if not file.is_file()), len(self._files))
        atomic_write(self._out / "samples.json", text)
        return 0

    def _compare(self, given: dict[str, Any]) -> None:
        path = self._out / "samples.json"
        try:
            recorded = dict(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"cannot read {path}: {first_line(error)}; name a new folder") from None
        if recorded.pop("samples", None) != given.pop("samples"):
            raise UserError(f"{self._out} holds images of other prompts; name a new folder")
        if changes := differences(recorded, given):
            raise UserError(f"{self._out} holds images made otherwise: {describe(changes)}; name a new folder")

    def add(self, first: int, images: np.ndarray) -> None:
        """Writes uint8 `images [B, H, W, 3]`, those of the prompts from index `first` on."""
        for index, image in enumerate(images, first):
            save_image(Image.fromarray(image), self._files[index])

    def finish(self) -> None:
        """Writes the grid, of at most `SHOWN` images, evenly spread."""
        indices = even_indices(len(self._files), SHOWN)
        images = (np.asarray(Image.open(self._files[index])) for index in indices)
        prompts = [self._prompts[index] for index in indices]
        save_image(_sheet(_thumbnails(images, len(indices)), prompts), self._out / "grid.png")


def _columns(count: int) -> int:
    return math.ceil(math.sqrt(count))


def _thumbnails(images: Iterable[np.ndarray], count: int) -> list[np.ndarray]:
    """`images` at the size that they have on a sheet of `count`."""
    return [shrink(image, _SHEET_SIDE // _columns(count)) for image in images]


def _sheet(thumbnails: Sequence[np.ndarray], prompts: Sequence[str]) -> Image.Image:
    return grid(np.stack(thumbnails), _columns(len(prompts)), prompts)


def _check_writable(out: Path, folder: Path) -> None:
    """Finds out before hours of sampling, not after them, whether `out` can be written into `folder`."""
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        if os.path.lexists(out.parent):
            out.exists()  # raises where a parent is no folder or the name is too long
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
