"""The policy gradient of each step by itself, in independent rollouts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from egrpo_jax.analysis.estimates import Agreement, agreement
from egrpo_jax.analysis.sampling import Replicate, Sampling
from egrpo_jax.common.trees import partition
from egrpo_jax.parallel.fsdp import Layout
from egrpo_jax.parallel.mesh import compiled
from egrpo_jax.rl.transitions import Transitions
from egrpo_jax.training.job import Job
from egrpo_jax.training.phases import prepare


def step_agreements(sampling: Sampling, replicates: Sequence[Replicate], done: Callable[[], None]) -> list[Agreement]:
    """The agreement of the gradients at each branch of the plan, of groups of the first of each pair.

    No more than two gradients are in memory: the sum of all, and one, made a second time for its product with that.
    """
    job = sampling.job
    gradient = _make_gradient(job)
    trained, frozen = partition(sampling.params, job.pipeline.trainable)
    advantages = [_advantages(sampling, replicate) for replicate in replicates]
    weights = job.plan.step_weights(job.config.learner.step_weights).astype(np.float32)
    product = jax.jit(lambda one, other: optax.tree.vdot(one, other))
    add = jax.jit(lambda total, one: optax.tree.add(total, one), donate_argnums=0)

    def gradients(step: int) -> Iterable[Any]:
        for replicate, advantage in zip(replicates, advantages, strict=True):
            transitions = jax.tree.map(jnp.asarray, replicate.transitions)
            yield gradient(trained, frozen, transitions, advantage, weights, step, sampling.conditioning)

    found = []
    for step in range(len(job.plan.branches)):
        total = functools.reduce(add, gradients(step))
        products = [(product(each, each), product(each, total)) for each in gradients(step)]
        squares, with_sum = np.array(jax.device_get(products), np.float64).T
        found.append(agreement(squares, with_sum, float(product(total, total))))
        done()
    return found


def _advantages(sampling: Sampling, replicate: Replicate) -> chex.Array:
    """`[P, K, G]`, by the credit of the config within the first of each pair; 0 for the others, which do not train."""
    train = sampling.job.config.rewards.train
    half = {name: replicate.scores[name][:, :, None, ::2] for name in train}
    came = np.ones_like(half[train[0]], bool)  # `judge` sees to that
    advantage = sampling.phases.credit(half, came, None)
    return jnp.stack([advantage, jnp.zeros_like(advantage)], axis=-1).reshape(*advantage.shape[:2], -1)


def _make_gradient(job: Job) -> Callable[..., Any]:
    layout = Layout.of(job.pipeline.abstract(jax.sharding.get_mesh()), job.pipeline.dtype)

    def gradient(
        trained: Any,
        frozen: Any,
        transitions: Transitions,
        advantage: chex.Array,
        weights: chex.Array,
        step: chex.Array,
        conditioning: Any,
    ) -> Any:
        lesson = prepare(job, layout, frozen, (transitions,), advantage, weights, conditioning)
        batches = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, step, keepdims=False), lesson.batches)
        return lesson.gradient(trained, batches)[0]

    return compiled(gradient)
