"""The choice of prompts that train: of several candidates those whose anchors have the most usual rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import numpy as np

from egrpo_jax.parallel import hosts
from egrpo_jax.rewards import RewardError, Scores
from egrpo_jax.rl.plan import AnchorPlan
from egrpo_jax.rl.transitions import Anchors
from egrpo_jax.run.timing import PhaseTimer
from egrpo_jax.training.job import Job
from egrpo_jax.training.phases import Phases
from egrpo_jax.training.scoring import hand_in, wait
from egrpo_jax.training.state import Running


class Given(NamedTuple):
    """The rollouts of an iteration before they are made.

    Attributes:
      prompts: of each.
      conditioning: pytree with leading axis P.
      keys: `[P]`.
      anchors: of more of them, where these have been walked, and the rows that these rollouts have there.
    """

    prompts: Sequence[str]
    conditioning: Any
    keys: chex.Array
    anchors: tuple[Anchors, np.ndarray] | None = None


def choose_prompts(
    job: Job, phases: Phases, params: Any, given: Given, running: Running | None, timer: PhaseTimer
) -> Given:
    """Of each so many candidates the prompt whose anchor has the reward that is nearest to the running mean.

    Before there is one, it is the candidates' own.
    """
    assert phases.screen
    assert phases.candidates  # both are there with candidates
    with timer.phase("rollout"):
        anchors, ends = jax.block_until_ready(phases.screen(params, given.conditioning, given.keys))
    with timer.phase("decode"):
        images = jax.block_until_ready(phases.decode(params, ends))
    with timer.phase("reward"):
        found = _judge(job, phases.candidates.sample, images, given.prompts)
    per = len(given.prompts) // job.rollouts
    rewards = found.reshape(-1, per)
    with np.errstate(invalid="ignore"):
        mean = running.mean if running else np.nan_to_num(np.nanmean(np.where(np.isfinite(rewards), rewards, np.nan)))
    distance = np.where(np.isfinite(rewards), abs(rewards - mean), np.inf)
    rows = distance.argmin(1) + per * np.arange(len(rewards))
    conditioning, keys = jax.tree.map(lambda x: x[rows], (given.conditioning, given.keys))
    return Given([given.prompts[row] for row in rows], conditioning, keys, (anchors, rows))


def _judge(job: Job, sample: np.ndarray, images: jax.Array, prompts: Sequence[str]) -> np.ndarray:
    """The weighted sum of the training rewards of each prompt's image, nan where one never came."""
    real, config = sample >= 0, job.config.rewards
    shown = np.array(prompts, object)[np.maximum(sample, 0)]
    with hosts.agreed(RewardError):
        part = hand_in(job, images, shown, dict.fromkeys(config.train, real))
        mine = wait(part, len(sample))
    (judged,) = hosts.total([mine])
    found = np.full(len(prompts), np.nan)
    found[sample[real]] = config.total({name: judged.scores[name].with_nan() for name in config.train})[real]
    return found


def updated(running: Running | None, job: Job, scores: dict[str, Scores]) -> Running | None:
    """The running mean and variance of rewards with those of an iteration; as they were if none came."""
    assert isinstance(job.plan, AnchorPlan)  # which alone keeps them
    config, keep = job.config.rewards, job.plan.memory
    came = np.stack([scores[name].came for name in config.train]).all(0)
    if not came.any():
        return running
    total = config.total({name: scores[name].values for name in config.train})
    now = Running(float(total[came].mean()), float(total[came].var()))
    if running is None:
        return now
    return Running(*(keep * old + (1 - keep) * new for old, new in zip(running, now, strict=True)))
