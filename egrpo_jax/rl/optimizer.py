"""The optimizer: AdamW with gradient clipping."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import chex
import jax.numpy as jnp
import optax

from egrpo_jax.common.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The config section `optim`; the defaults are the paper's (arXiv:2601.00423, section 5.1), the rest of AdamW
    as in optax.

    Attributes:
      learning_rate: reached after `warmup_updates` linear steps, then constant.
      warmup_updates: optimizer updates of the warm-up.
      b1, b2, eps, weight_decay: of AdamW.
      first_moment_dtype: what AdamW's first moment is stored in; the second stays float32, since bfloat16 would lose
        its small increments.
      grad_clip: largest global norm of a gradient.
      max_skipped: so many updates skipped in a row, for a loss or gradient that is not finite, end the run.
    """

    learning_rate: float = 2e-6
    warmup_updates: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    grad_clip: float = 1.0
    max_skipped: int = 10

    def __post_init__(self) -> None:
        for key in ("learning_rate", "grad_clip", "eps"):
            if not getattr(self, key) > 0:
                raise ConfigError(key, getattr(self, key), "a positive number")
        for key in ("b1", "b2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(key, getattr(self, key), "a number in [0, 1)")
        for key, least in (("weight_decay", 0), ("warmup_updates", 0), ("max_skipped", 1)):
            if getattr(self, key) < least:
                raise ConfigError(key, getattr(self, key), f"at least {least}")


def make_schedule(config: OptimConfig) -> optax.Schedule:
    """Learning rate by optimizer update."""
    if not config.warmup_updates:
        return optax.constant_schedule(config.learning_rate)
    return optax.linear_schedule(
        config.learning_rate / config.warmup_updates, config.learning_rate, config.warmup_updates
    )


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW of clipped gradients, all in float32 whatever parameters are stored in."""
    adamw = optax.inject_hyperparams(
        optax.adamw, static_args=("b1", "b2", "eps", "eps_root", "weight_decay", "mu_dtype")
    )(
        make_schedule(config),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.dtype(config.first_moment_dtype),
    )
    return _in_float32(optax.chain(optax.clip_by_global_norm(config.grad_clip), adamw))


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, that sees parameters and gradients in float32 whatever they are stored in."""
    cast = lambda tree: optax.tree.cast(tree, jnp.float32)
    return optax.GradientTransformation(
        init=lambda params: inner.init(cast(params)),
        update=lambda grads, state, params: inner.update(cast(grads), state, cast(params)),
    )


def last_learning_rate(opt_state: Any) -> chex.Array:
    """The learning rate of the last update that was applied."""
    return optax.tree.get(opt_state, "hyperparams")["learning_rate"]
