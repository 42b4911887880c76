"""The optimizer: AdamW with gradient clipping."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import chex
import jax
import jax.numpy as jnp
import optax

from egrpo_jax.common.ranges import Count, CountOrZero, Decay, GradNorm, LearningRate, Range, WeightDecay, check


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The config section `optim`; the defaults are the paper's (arXiv:2601.00423, section 5.1), the rest of AdamW
    as in optax.

    Attributes:
      learning_rate: reached after `warmup_updates` linear steps, then constant.
      warmup_updates: optimizer updates of the warm-up.
      b1: decay of AdamW's first moments.
      b2: decay of AdamW's second moments.
      eps: of AdamW's denominator.
      weight_decay: of AdamW; decoupled, times the learning rate.
      first_moment_dtype: what AdamW's first moment is stored in; the second stays float32, since bfloat16 would lose
        its small increments.
      offload: let the moments rest in the hosts' memory, which brings them to the devices in each update.
      grad_clip: largest global norm of a gradient.
      max_skipped: so many updates skipped in a row, for a loss or gradient that is not finite, end the run.
    """

    learning_rate: LearningRate = 2e-6
    warmup_updates: CountOrZero = 0
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Annotated[float, Range(1e-16, 1)] = 1e-8
    weight_decay: WeightDecay = 1e-4
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False
    grad_clip: GradNorm = 1.0
    max_skipped: Count = 10

    def __post_init__(self) -> None:
        check(self)


def make_schedule(config: OptimConfig) -> optax.Schedule:
    """Learning rate by optimizer update."""
    if not config.warmup_updates:
        return optax.constant_schedule(config.learning_rate)
    return optax.linear_schedule(
        config.learning_rate / config.warmup_updates, config.learning_rate, config.warmup_updates
    )


def make_optimizer(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW of clipped gradients, all in float32 whatever parameters are stored in.

    Its `update` takes the gradient's global norm as `norm` where it is called for a part of the gradient; but for that,
    it changes each element by itself.
    """
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
    return _in_float32(optax.chain(_clip_by_norm(config.grad_clip), adamw))


def _clip_by_norm(largest: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm`, of a gradient whose norm may be known."""

    def update(grads: Any, state: Any, params: Any = None, *, norm: Any = None, **_: Any) -> tuple[Any, Any]:
        del params
        norm = optax.tree.norm(grads) if norm is None else norm
        return jax.tree.map(lambda grad: jnp.where(norm < largest, grad, grad / norm * largest), grads), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _in_float32(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """`inner`, that sees parameters and gradients in float32 whatever they are stored in."""
    cast = lambda tree: optax.tree.cast(tree, jnp.float32)
    return optax.GradientTransformationExtraArgs(
        init=lambda params: inner.init(cast(params)),
        update=lambda grads, state, params, **known: inner.update(cast(grads), state, cast(params), **known),
    )


def last_learning_rate(opt_state: Any) -> chex.Array:
    """The learning rate of the last update that was applied."""
    return optax.tree.get(opt_state, "hyperparams")["learning_rate"]
