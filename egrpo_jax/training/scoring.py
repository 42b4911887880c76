"""Images to scores: each process scores those that its devices have made, and all know what came of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.images import finite_images
from egrpo_jax.parallel import hosts
from egrpo_jax.rewards import CheckedReward, Pending, Scores
from egrpo_jax.rl.plan import Deal
from egrpo_jax.training.job import Job

DIVERSITY = "diversity"
"""The name of the scores that `group_distance` gives."""


class HandedIn(NamedTuple):
    """Images of a rollout that this process has handed in: for each reward, which of all rows, and their scores.

    `features` are of all of them, 0 where an image is not finite; None where they are not asked for.
    """

    finite: np.ndarray
    rows: np.ndarray
    pending: dict[str, tuple[np.ndarray, Pending[Scores]]]
    features: np.ndarray | None


class Judged(NamedTuple):
    """Of all M images of a rollout, in the order of its deal: if they are finite, `[M]`, their scores and features."""

    finite: np.ndarray
    scores: dict[str, Scores]
    features: np.ndarray | None


def hand_in(
    job: Job, images: jax.Array, prompts: np.ndarray, scored: dict[str, np.ndarray], by: str | None = None
) -> HandedIn:
    """Begins to score those of M images that this process's devices have made.

    Args:
      images: `[M, H, W, 3]`.
      prompts: what they show, `[M]`.
      scored: for each reward, which of them it scores, `[M]`.
      by: a reward whose features of all of them are wanted.
    """
    rows, own = hosts.own_rows(images)
    pending = {}
    with hosts.alone(jax.sharding.get_mesh()):
        for name, which in scored.items():
            chosen = which[rows]
            judged = own if chosen.all() else jnp.take(own, np.flatnonzero(chosen), axis=0, mode="clip")
            scores = job.rewards[name].start(judged, list(prompts[rows][chosen]))
            pending[name] = rows[chosen], scores
        finite = np.asarray(finite_images(own))
        features = None if by is None else _features(job.rewards[by], own, finite)
        return HandedIn(finite, rows, pending, features)


def _features(reward: CheckedReward, images: jax.Array, finite: np.ndarray) -> np.ndarray:
    """Of images `[B, H, W, 3]` vectors `[B, F]` of length 1; 0 where one is not `finite`, which none is shown."""
    assert reward.encode_images  # `make_job` demands it
    whole = jnp.where(jnp.asarray(finite)[:, None, None, None], images, 0.5)
    return np.where(finite[:, None], np.asarray(reward.encode_images(whole), np.float32), 0)


def group_distance(features: np.ndarray, finite: np.ndarray) -> Scores:
    """The distance of each image of a group from the others, the mean of 1 - cos over those that are finite.

    Args:
      features: `[..., G, F]`, of length 1.
      finite: `[..., G]`; an image that is not, or that is alone, has no score.
    """
    apart = 1 - np.einsum("...if,...jf->...ij", features, features)
    pairs = finite[..., :, None] & finite[..., None, :] & ~np.eye(finite.shape[-1], dtype=bool)
    count = pairs.sum(-1)
    mean = np.sum(apart, -1, where=pairs) / np.maximum(count, 1)
    return Scores(mean.astype(np.float32), count > 0)


def wait(part: HandedIn, count: int) -> Judged:
    """All that is known of `count` images, once this process's own are scored."""
    scores = {name: hosts.placed(pending(), rows, count) for name, (rows, pending) in part.pending.items()}
    whole = lambda values: hosts.placed(values, part.rows, count)
    return Judged(whole(part.finite), scores, None if part.features is None else whole(part.features))


def in_order(values: np.ndarray, deal: Deal, shape: tuple[int, ...]) -> np.ndarray:
    """`values [M, ...]` of images in the order of `deal`, by the sample that each is of: `shape` (P, E, R, G)."""
    ordered, real = np.empty((math.prod(shape), *values.shape[1:]), values.dtype), deal.sample >= 0
    ordered[deal.sample[real]] = values[real]
    return ordered.reshape(*shape, *values.shape[1:])
