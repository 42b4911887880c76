"""Legibility of the text that an image was to show, as in Flow-GRPO (arXiv:2505.05470).

The text is what stands first in double quotes in the prompt. With d the edit distance between it and what was read,
both in lower case and without white space, the score is 1 - min(d, n) / n, n being the length of the text; d is 0 if
the text occurs in what was read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import chex
import numpy as np

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.images import to_uint8

Reader = Callable[[np.ndarray], str]
"""`(image[H, W, 3], uint8 RGB) -> text` that was read in it."""

_AS_IN_FLOW_GRPO = {"Global.use_cls": False, "Det.limit_type": "max", "Det.limit_side_len": 960}
"""Settings of PaddleOCR there: text upside down is not turned; images are made smaller, never larger, to be read."""

_QUOTED = re.compile(r'["“]([^"“”]*)["”]')


class OcrReward:
    """Scores in [0, 1]; 1 is text without a mistake, whatever else was written beside it."""

    def __init__(self, read: Reader):
        self._read = read

    def __call__(self, images: chex.Array, prompts: Sequence[str]) -> np.ndarray:
        """Scores `[B]` of `images [B, H, W, 3]` in [0, 1] for their `prompts`; raises as `require`."""
        self.require(prompts, images.shape[1:3])
        texts = [wanted_text(prompt) for prompt in prompts]
        pairs = zip(to_uint8(images), texts, strict=True)
        return np.array([legibility(self._read(image), text) for image, text in pairs], np.float32)

    def require(self, prompts: Sequence[str], size: tuple[int, int]) -> None:
        """Raises UserError if a prompt has nothing in double quotes; images may have any `size`."""
        del size
        without = [prompt for prompt in prompts if not wanted_text(prompt)]
        if without:
            raise UserError(
                "expected prompts with the text to render in double quotes; "
                f"{len(without)} of {len(prompts)} have none, the first is {without[0]!r}"
            )


def ocr(*_: object) -> OcrReward:
    """The reward with the PP-OCR models that rapidocr brings along, on the CPU.

    Raises:
      UserError: rapidocr is not installed.
    """
    return OcrReward(_rapidocr())


def wanted_text(prompt: str) -> str:
    """The text that stands first in double quotes in `prompt`, `bare`; empty if none does."""
    found = _QUOTED.search(prompt)
    return bare(found[1]) if found else ""


def bare(text: str) -> str:
    """`text` in lower case and without white space."""
    return "".join(text.lower().split())


def legibility(read: str, text: str) -> float:
    """The share of `text`, which is bare and not empty, that is in what was `read`, in [0, 1]."""
    seen = bare(read)
    distance = 0 if text in seen else edit_distance(seen, text)
    return 1 - min(distance, len(text)) / len(text)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's: the least number of characters to insert, delete or replace."""
    above = list(range(len(second) + 1))
    for row, character in enumerate(first, 1):
        current = [row]
        for column, other in enumerate(second, 1):
            replaced = above[column - 1] + (character != other)
            current.append(min(replaced, above[column] + 1, current[-1] + 1))
        above = current
    return above[-1]


def _rapidocr() -> Reader:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(f"the reward 'ocr' needs rapidocr ({error}): pip install 'egrpo_jax[ocr]'") from None
    engine = RapidOCR(params={"Global.log_level": "critical", **_AS_IN_FLOW_GRPO})

    def read(image: np.ndarray) -> str:
        lines = engine(np.ascontiguousarray(image[..., ::-1])).txts  # it takes BGR, as OpenCV does
        return "".join(lines or ())

    return read
