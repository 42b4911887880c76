"""The training loop that the embedded models share."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from egrpo_jax.common.ranges import Count, CountOrZero, Decay, GradNorm, LearningRate, WeightDecay, check

LossFn = Callable[[Any, Any, chex.PRNGKey], chex.Array]
"""`(params, data, key) -> loss`; draws its batch from `data` with `key`."""


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW with a linear warm-up, gradient clipping, and an average of the parameters.

    Attributes:
      steps: optimizer steps.
      batch_size: samples per step.
      lr: the peak learning rate.
      warmup: steps until it is reached, at most half of all.
      decay: whether it falls to zero along a cosine; constant otherwise.
      b2: decay of the second moments.
      weight_decay: decoupled weight decay.
      clip: largest norm of the gradient.
      ema: decay of the average.
    """

    steps: Count
    batch_size: Count
    lr: LearningRate = 2e-3
    warmup: CountOrZero = 50
    decay: bool = True
    b2: Decay = 0.99
    weight_decay: WeightDecay = 1e-4
    clip: GradNorm = 1.0
    ema: Decay = 0.998

    def __post_init__(self) -> None:
        check(self)

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer as an optax transformation."""
        warmup = min(self.warmup, self.steps // 2)
        if self.decay:
            rate = optax.warmup_cosine_decay_schedule(0.0, self.lr, warmup, self.steps)
        else:
            rate = optax.linear_schedule(0.0, self.lr, warmup)
        adamw = optax.adamw(rate, b2=self.b2, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip), adamw)


class State(NamedTuple):
    """The state that an update changes; `average` is the exponential moving average of `params`."""

    params: Any
    average: Any
    opt_state: Any


def fit(loss_fn: LossFn, params: Any, data: Any, optim: Optim, key: chex.PRNGKey) -> Iterator[tuple[int, Any]]:
    """Minimises `loss_fn`, yielding after each update its number, from 1, and the averaged parameters.

    Update n draws with `fold_in(key, n)`, so that a run depends on nothing but its arguments. The arrays yielded are
    valid until the next update, which reuses their memory.
    """
    optimizer = optim.transformation()

    def update(state: State, data: Any, number: chex.Array) -> tuple[State, chex.Array]:
        loss, gradient = jax.value_and_grad(loss_fn)(state.params, data, jax.random.fold_in(key, number))
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # The average starts as a plain mean, or the random initialisation would linger in it.
        decay = jnp.minimum(optim.ema, number / (number + 10.0))
        average = optax.incremental_update(params, state.average, 1 - decay)
        return State(params, average, opt_state), loss

    compiled = jax.jit(update, donate_argnums=0)
    params = jax.tree.map(jnp.asarray, params)
    state = State(params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    bar = tqdm(range(1, optim.steps + 1), unit="step", mininterval=1.0)
    for number in bar:
        state, loss = compiled(state, data, np.int32(number))
        if number % 20 == 0:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        yield number, state.average


def last(steps: Iterator[tuple[int, Any]]) -> Any:
    """The averaged parameters after the last of `steps`, on the host."""
    ((_, average),) = collections.deque(steps, maxlen=1)
    return jax.device_get(average)


def rounded(params: Any) -> Any:
    """`params` as a shipped file gives them back: through float16."""
    return jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), params)


def count(params: Any) -> int:
    """The number of numbers in `params`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
