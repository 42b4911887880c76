"""Images and prompts that scorers are compared on, made by rule."""

import numpy as np

from tests.oracle.tokenizers import PROMPTS

SIZES = {"square": (96, 96), "wide": (60, 107), "tall": (101, 64), "odd": (75, 43), "small": (19, 24)}
TEXTS = (
    *PROMPTS,
    "a &lt;b&gt;cat&lt;/b&gt; &amp;amp; the dogâ€™s photo",
    "\ufb01ne \uff23\uff21\uff34\u00a0photo\x85of the\u2028cat…",
    "e&#769;clair of TWO ΣΑΣ İ cats",
    "the <|endoftext|> is no <|startoftext|>",
)
"""`PROMPTS`, and texts that open_clip mends."""


def images(size, count=2):
    """Images uint8 `[count, H, W, 3]` of a size of `SIZES`: squares, whose edges any mistake in resizing moves."""
    height, width = SIZES[size]
    rng = np.random.default_rng(list(SIZES).index(size))
    squares = rng.integers(0, 256, (count, height // 6 + 1, width // 6 + 1, 3), np.uint8)
    return squares.repeat(6, 1).repeat(6, 2)[:, :height, :width]


def prompts(size, count=2):
    """A prompt for each of `images`."""
    first = 2 * list(SIZES).index(size)
    return [PROMPTS[(first + row) % len(PROMPTS)] for row in range(count)]
