"""The API "scores": plain HTTP between a training run and a reward, for both ends.

POST of `{"images": [PNG in base64, ...], "prompts": [text, ...]}`, both of one length B; the answer is
`{"scores": [number, ...]}`, the score of each image in the same order, null for one that has none.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from egrpo_jax.rewards.remote.address import ascii_url
from egrpo_jax.rewards.remote.post import Fault

_LARGEST = float(np.finfo(np.float32).max)
MOST_PIXELS = 2**26
"""Pixels in all images of a request together: 16 of 2048 x 2048."""


class Scores:
    """The client's end, a `client.Api`."""

    def __init__(self, url: str, batch: int):
        """Raises ConfigError: it is no address."""
        self.url, self.batch = ascii_url(url), batch

    def request(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
        """The JSON of the request for `images [B, H, W, 3]`, uint8."""
        return {"images": [_to_png(image) for image in images], "prompts": list(prompts)}

    def scores(self, answer: Any, count: int) -> list[float]:
        """The `count` scores in `answer`, nan for what is no number. Raises Fault if they are not that many."""
        found = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(found, list) or len(found) != count:
            raise Fault("wrong answer", f"expected {count} scores, found {answer!r:.150}")
        return [to_number(value) for value in found]


def to_number(value: Any) -> float:
    """`value` of an answer as a number that float32 holds; nan if it is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= _LARGEST else math.nan


def read_request(request: Any) -> tuple[np.ndarray, list[str]]:
    """Images `[B, H, W, 3]` in [0, 1], float32, and prompts of the JSON `request`: the server's end.

    Raises:
      ValueError: it is not as the API has it; the message says what is wrong.
    """
    images, prompts = (request.get(key) if isinstance(request, dict) else None for key in ("images", "prompts"))
    if not isinstance(images, list) or not isinstance(prompts, list) or len(images) != len(prompts) or not images:
        raise ValueError('expected {"images": [...], "prompts": [...]}, two lists of one length, not empty')
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError("prompts: expected texts")
    decoded = [_from_png(image, MOST_PIXELS // len(images)) for image in images]
    if len({image.shape for image in decoded}) > 1:
        raise ValueError("images: expected one size in a request, found several")
    return np.stack(decoded).astype(np.float32) / 255, prompts


def _to_png(image: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def _from_png(text: Any, most_pixels: int) -> np.ndarray:
    """The image `[H, W, 3]`, uint8. Raises ValueError."""
    if not isinstance(text, str):
        raise ValueError("images: expected texts, each a PNG in base64")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
    except (ValueError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"images: expected PNG files in base64 ({error})") from None
    if image.mode != "RGB":
        raise ValueError(f"images: expected mode RGB, found {image.mode}")
    if image.width * image.height > most_pixels:
        raise ValueError(f"images: expected at most {MOST_PIXELS} pixels in a request, found an image {image.size}")
    try:
        return np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow's for a damaged file
        raise ValueError(f"images: a damaged PNG ({error})") from None
