"""What a reward is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import chex

Reward = Callable[[chex.Array, Sequence[str]], chex.Array]
"""`(images[B, H, W, 3] in [0, 1], prompts) -> scores[B]`, float32, higher is better, always the same for the same; nan
where no score came. One that has a method `start` with these arguments works in the background: see `start`."""

Pending = Callable[[], chex.Array]
"""Waits for the scores `[B]` of images handed in before."""


def start(reward: Reward, images: chex.Array, prompts: Sequence[str]) -> Pending:
    """Hands `images` in for scoring; a reward on another machine scores them while this one goes on."""
    in_background = getattr(reward, "start", None)
    if in_background is not None:
        return in_background(images, prompts)
    scores = reward(images, prompts)
    return lambda: scores
