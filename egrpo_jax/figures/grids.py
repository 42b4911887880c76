"""Images for people: uint8, captioned grids, before and after, files."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.images import to_display

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""What Pillow calls the format of a file, by its ending."""
_QUALITY = 95
"""Of JPEG and WebP."""
_GAP = 8
_FONT_SIZE = 15
_LINE = 19
_DESCENT = 4
_MAX_LINES = 3
_SMALL_SIDE = 160
_BAND = 8
_PAIR_GAP = 4
_LABEL_SIZE = 24
_MARGIN = 36


def grid(
    images: ArrayLike, columns: int, captions: Sequence[str] | None = None, scale: int | None = None
) -> Image.Image:
    """All images in rows of `columns`, each above its caption.

    Args:
      images: [B, H, W, 3] in [0, 1], or uint8.
      columns: images per row.
      captions: B texts, wrapped to the width of an image and cut after three lines.
      scale: whole factor of enlargement, the pixels staying sharp squares; by default images below 160 pixels are
        enlarged beyond that.
    """
    tiles = _tiles(images, scale)
    return _arrange([_with_caption(tile, text) for tile, text in _captioned(tiles, captions)], columns)


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """`image [H, W, 3]`, uint8, reduced so that neither side is longer than `side`."""
    thumbnail = Image.fromarray(image)
    thumbnail.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.array(thumbnail)


def before_after(
    before: ArrayLike,
    after: ArrayLike,
    captions: Sequence[str],
    title: str = "",
    labels: tuple[str, str] = ("before", "after"),
) -> Image.Image:
    """Bands of up to eight images before, the same after below them, and the captions underneath.

    Args:
      before: [B, H, W, 3] in [0, 1], or uint8.
      after: [B, H, W, 3] in [0, 1], or uint8.
      captions: B texts.
      title: stands above, and should say how the images were chosen.
      labels: of the two rows.
    """
    old, new = _tiles(before, None), _tiles(after, None)
    columns = [
        _with_caption(stack([first, second], gap=_PAIR_GAP), text)
        for first, second, text in zip(old, new, captions, strict=True)
    ]
    bands = [
        _with_row_labels(_arrange(columns[start : start + _BAND], _BAND), old[0].height, labels)
        for start in range(0, len(columns), _BAND)
    ]
    return stack([_heading(title, bands[0].width), *bands] if title else bands)


def stack(images: Sequence[Image.Image], gap: int = 0) -> Image.Image:
    """Images one below the other on white, flush left, `gap` pixels apart."""
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    sheet, top = Image.new("RGB", (max(image.width for image in images), height), "white"), 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height + gap
    return sheet


def save_image(image: Image.Image, path: str | os.PathLike[str]) -> None:
    """Writes `image` to `path`, in the format of its ending, one of `FORMATS`, whole or not at all.

    Raises:
      UserError: `path` cannot be written.
    """
    buffer = io.BytesIO()
    image.save(buffer, format=FORMATS[Path(path).suffix.lower()], quality=_QUALITY)
    atomic_write(path, buffer.getvalue())


def _tiles(images: ArrayLike, scale: int | None) -> list[Image.Image]:
    pixels = np.asarray(images)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or not len(pixels):
        raise ValueError(f"expected images [B, H, W, 3], found {pixels.shape}")
    height, width = pixels.shape[1:3]
    scale = scale or math.ceil(_SMALL_SIDE / max(height, width))
    return [
        Image.fromarray(tile).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        for tile in to_display(pixels)
    ]


def _captioned(tiles: list[Image.Image], captions: Sequence[str] | None) -> list[tuple[Image.Image, str]]:
    return list(zip(tiles, [""] * len(tiles) if captions is None else captions, strict=True))


def _with_caption(tile: Image.Image, text: str) -> Image.Image:
    """`tile` on white with `text` centred below it."""
    font = ImageFont.load_default(_FONT_SIZE)
    lines = _wrap(text, tile.width, font)
    result = Image.new("RGB", (tile.width, tile.height + _LINE * len(lines) + _DESCENT), "white")
    result.paste(tile)
    draw = ImageDraw.Draw(result)
    for row, line in enumerate(lines):
        draw.text((tile.width / 2, tile.height + _LINE * row + 2), line, fill="black", font=font, anchor="ma")
    return result


def _with_row_labels(band: Image.Image, row_height: int, labels: tuple[str, str]) -> Image.Image:
    """`band` with `labels`, read upwards, left of its two rows of images."""
    font = ImageFont.load_default(_LABEL_SIZE)
    result = Image.new("RGB", (_MARGIN + band.width, band.height), "white")
    result.paste(band, (_MARGIN, 0))
    for row, word in enumerate(labels):
        label = Image.new("RGB", (row_height, _MARGIN), "white")
        ImageDraw.Draw(label).text((row_height / 2, _MARGIN / 2), word, fill="black", font=font, anchor="mm")
        result.paste(label.rotate(90, expand=True), (0, _GAP + row * (row_height + _PAIR_GAP)))
    return result


def _heading(text: str, width: int) -> Image.Image:
    """`text` on a line of `width`, or wider where it needs more."""
    font = ImageFont.load_default(_LABEL_SIZE)
    needed = math.ceil(font.getlength(text)) + 2 * (_MARGIN + _GAP)
    result = Image.new("RGB", (max(width, needed), 2 * _LABEL_SIZE), "white")
    ImageDraw.Draw(result).text((_MARGIN + _GAP, _LABEL_SIZE), text, fill="black", font=font, anchor="lm")
    return result


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """`text` in at most three lines of `width` pixels; what does not fit ends in an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    shown = lines[:_MAX_LINES]
    if len(lines) > _MAX_LINES:
        shown[-1] += "..."
    return [_shorten(line, width, font) for line in shown]


def _shorten(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix("...")
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."


def _arrange(tiles: list[Image.Image], columns: int, gap: int = _GAP) -> Image.Image:
    """Tiles of one width in rows of `columns` on white; each row is as high as its highest tile."""
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    width = tiles[0].width
    size = (gap + min(columns, len(tiles)) * (width + gap), gap + sum(height + gap for height in heights))
    sheet, top = Image.new("RGB", size, "white"), gap
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (gap + column * (width + gap), top))
        top += height + gap
    return sheet
