"""A flow model with all that turns prompts into images: what every program runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Sequence
from typing import Any

import chex
import jax

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.trees import partition
from egrpo_jax.flow.solver import VelocityFn
from egrpo_jax.parallel.rules import Rules


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Prompts to images.

    Attributes:
      velocity: `(params, latents[B, N, D], time[B], conditioning) -> velocity[B, N, D]`.
      params: of velocity and decoder, a pytree of arrays.
      encode: prompts to the conditioning, a pytree with leading axis B.
      decode: `(params, latents[B, N, D])`, the latents at t = 0, to images `[B, H, W, 3]` in [0, 1]; traceable.
      latents_shape: (N, D).
      rules: how the parameters are sharded; by default they are replicated.
      trainable: regular expression, found in the paths (joined with '/') of the parameters that training changes.
      forward_flops: floating-point operations of one sample's velocity, where known.
      sampling_shift: shift of the time grid on which the published model samples, where it has one of its own.
      known_prompts: all that `encode` takes; None if it takes any.
    """

    velocity: VelocityFn
    params: Any
    encode: Callable[[Sequence[str]], Any]
    decode: Callable[[Any, chex.Array], chex.Array]
    latents_shape: tuple[int, int]
    rules: Rules = ()
    trainable: str = ""
    forward_flops: float | None = None
    sampling_shift: float | None = None
    known_prompts: Container[str] | None = None

    def __post_init__(self) -> None:
        if not jax.tree.leaves(partition(self.params, self.trainable)[0]):
            raise UserError(f"trainable {self.trainable!r} is found in no parameter's path, so nothing can be trained")

    def require(self, prompts: Sequence[str]) -> None:
        """Raises UserError if `encode` does not take one of `prompts`."""
        missing = [] if self.known_prompts is None else [p for p in prompts if p not in self.known_prompts]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(prompts)} prompts have no stored embedding, the first is {missing[0]!r}; "
                "make them with python -m egrpo_jax.encode"
            )
