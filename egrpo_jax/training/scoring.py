"""Images to scores: each process scores those that its devices have made, and all know what came of them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.images import finite_images
from egrpo_jax.parallel import hosts
from egrpo_jax.rewards import Pending, Scores
from egrpo_jax.rl.plan import Deal
from egrpo_jax.training.job import Job


class HandedIn(NamedTuple):
    """Images of a rollout that this process has handed in: for each reward, which of all rows, and their scores."""

    finite: np.ndarray
    rows: np.ndarray
    pending: dict[str, tuple[np.ndarray, Pending[Scores]]]


class Judged(NamedTuple):
    """Of all M images of a rollout, in the order of its tails: if they are finite, `[M]`, and their scores."""

    finite: np.ndarray
    scores: dict[str, Scores]


def hand_in(job: Job, images: jax.Array, prompts: np.ndarray, scored: dict[str, np.ndarray]) -> HandedIn:
    """Begins to score those of M images that this process's devices have made.

    `prompts [M]` are what they show, and `scored` says for each reward which of them it scores.
    """
    rows, own = hosts.own_rows(images)
    pending = {}
    with hosts.alone(jax.sharding.get_mesh()):
        for name, which in scored.items():
            chosen = which[rows]
            judged = own if chosen.all() else jnp.take(own, np.flatnonzero(chosen), axis=0, mode="clip")
            scores = job.rewards[name].start(judged, list(prompts[rows][chosen]))
            pending[name] = rows[chosen], scores
        return HandedIn(np.asarray(finite_images(own)), rows, pending)


def wait(part: HandedIn, count: int) -> Judged:
    """All that is known of `count` images, once this process's own are scored."""
    scores = {name: hosts.placed(pending(), rows, count) for name, (rows, pending) in part.pending.items()}
    return Judged(hosts.placed(part.finite, part.rows, count), scores)


def in_order(values: np.ndarray, deal: Deal, shape: tuple[int, ...]) -> np.ndarray:
    """`values` of a rollout's images, in the order of `deal`, by the sample that each is of: `shape` (P, E, R, G)."""
    ordered, real = np.empty(shape, values.dtype), deal.sample >= 0
    ordered.ravel()[deal.sample[real]] = values[real]
    return ordered
