"""Rewards as the library uses them: whatever one gives becomes `Scores`, or one line that names the reward."""

from __future__ import annotations

import contextlib
import math
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.images import finite_images
from egrpo_jax.rewards.base import Pending, Reward, Scores, start


class RewardError(UserError):
    """A reward raised an exception, or gave what are no scores."""


class UnfitInputError(RewardError):
    """A reward says that it cannot score such images or prompts."""


class CheckedReward:
    """A reward that gives `Scores`, and is never shown an image that is not finite: that one has no score.

    Attributes:
      name: of the reward, in the config and in every error.
    """

    def __init__(self, name: str, reward: Reward, own: bool = False):
        """`own`: a user's, whose exceptions are the user's to mend and become a `RewardError`."""
        self.name = name
        self._reward, self._own = reward, own

    @property
    def encode_images(self) -> Callable[[chex.Array], chex.Array] | None:
        """Images `[B, H, W, 3]` to vectors of length 1, `[B, D]`; None if the reward has no such."""
        return getattr(self._reward, "encode_images", None)

    def require(self, prompts: Sequence[str], size: tuple[int, int]) -> None:
        """Finds out, before a run is under way, whether the reward can score images of `size` (H, W) for `prompts`.

        A user's own is tried on two grey images, as arrays of NumPy, which evaluations hand it, and of JAX, which
        training does.

        Raises:
          UserError: it cannot.
        """
        require = getattr(self._reward, "require", None)
        if require is not None:
            with blamed(self.name, self._reward, self._own):
                require(prompts, size)
        if self._own:
            grey = np.full((2, *size, 3), 0.5, np.float32)
            for images in (grey, jnp.asarray(grey)):
                self(images, [*prompts, *prompts][:2])

    def __call__(self, images: chex.Array, prompts: Sequence[str]) -> Scores:
        """Scores of `images [B, H, W, 3]` in [0, 1] for their `prompts`; raises as `start`."""
        return self.start(images, prompts)()

    def start(self, images: chex.Array, prompts: Sequence[str]) -> Pending[Scores]:
        """Hands `images` in; what it returns waits for their scores.

        Raises:
          ValueError: images and prompts are not as many.
          UnfitInputError: the reward cannot score such images or prompts.
          RewardError: it gives anything but a number for each, or it is the user's own and raises; also when waiting.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need images [{len(prompts)}, H, W, 3], found {images.shape}")
        finite = np.asarray(finite_images(images))
        if len(finite) and finite.all():
            return self._start(images, prompts)
        rows = np.flatnonzero(finite).tolist()
        numbers = np.full(len(finite), math.nan, np.float32)
        pending = self._start(images[np.array(rows)], [prompts[row] for row in rows]) if rows else None

        def wait() -> Scores:
            if pending is not None:
                numbers[rows] = pending().with_nan()
            return Scores.of(numbers)

        return wait

    def _start(self, images: chex.Array, prompts: Sequence[str]) -> Pending[Scores]:
        """As `start`, of finite images alone."""
        with blamed(self.name, self._reward, self._own):
            pending = start(self._reward, images, prompts)

        def wait() -> Scores:
            with blamed(self.name, self._reward, self._own):
                found = pending()
                numbers = _to_numbers(found)
            count = len(prompts)
            if numbers is None or numbers.shape not in ((count,), (count, 1)):
                expected = f"expected an array [{count}] or a list of numbers, one for each image"
                raise RewardError(f"the reward {self.name!r} gave {_shown(found)}, {expected}")
            return Scores.of(numbers.reshape(count))

        return wait


@contextlib.contextmanager
def blamed(name: str, reward: Any, own: bool) -> Iterator[None]:
    """Puts the reward's `name` before what it says is wrong, and before any other exception of one that is `own`."""
    try:
        yield
    except UserError as error:
        raise UnfitInputError(f"the reward {name!r}: {error}") from error
    except Exception as error:
        if not own:
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise RewardError(f"the reward {name!r} raised {said}{_location(reward, error)}") from error


def _to_numbers(found: Any) -> np.ndarray | None:
    """Real numbers from what a reward gave, nan for None in a list; None if they are not such."""
    if isinstance(found, Scores):  # of a reward that is made of another
        found = found.with_nan()
    elif isinstance(found, list | tuple):
        found = [math.nan if value is None else _plain(value) for value in found]
    try:
        numbers = np.asarray(_plain(found))
    except (TypeError, ValueError):  # NumPy's for rows of several lengths
        return None
    kinds = (np.bool_, np.integer, np.floating)
    return numbers if any(jnp.issubdtype(numbers.dtype, kind) for kind in kinds) else None  # bfloat16 is one for JAX


def _plain(found: Any) -> Any:
    """A tensor of PyTorch as Python's numbers, from any device, of any type, with a gradient or without."""
    return found.tolist() if hasattr(found, "detach") else found


def _shown(found: Any) -> str:
    if hasattr(found, "shape") and hasattr(found, "dtype"):
        return f"an array {tuple(found.shape)} of {found.dtype}"
    shown = " ".join(reprlib.repr(found).split())
    return f"a list of {len(found)}, {shown}" if isinstance(found, list | tuple) else shown


def _location(reward: Any, error: Exception) -> str:
    """The last line of the reward's own file that `error` came through, if there is one."""
    file = getattr(sys.modules.get(getattr(reward, "__module__", "")), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" ({Path(file).name}, line {lines[-1]})" if file and lines else ""
