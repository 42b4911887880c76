"""One training iteration: rollout, images, rewards, advantages, update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.images import finite_images
from egrpo_jax.common.trees import combine
from egrpo_jax.data.prompts import prompts_at
from egrpo_jax.parallel import hosts
from egrpo_jax.rewards import Pending, RewardError, Scores
from egrpo_jax.rl.advantage import complete_groups
from egrpo_jax.rl.plan import Deal, Plan
from egrpo_jax.rl.transitions import Transitions, prompt_keys
from egrpo_jax.run.timing import PhaseTimer
from egrpo_jax.training.config import RewardsConfig
from egrpo_jax.training.job import Job
from egrpo_jax.training.numbers import reward_numbers, update_numbers
from egrpo_jax.training.phases import Phases
from egrpo_jax.training.state import Progress


class MissingScoreError(hosts.SharedError):
    """A score never came, and the config says to stop then."""


class NotFiniteError(hosts.SharedError):
    """The policy has diverged: its images, or too many updates in a row, were not finite."""


class Samples(NamedTuple):
    """The samples of an iteration and their scores.

    Attributes:
      transitions: of each block, `[P, M, S]`, P being rollouts.
      scores: of each training reward, `[P, E, R, G]`.
      heldout: the mean of each held-out reward over one sample of every group: it shows hacking early, and costs
        little.
      finite: `[P, E, R, G]`, whether an image is without nan and infinity; one that is not has no score.
    """

    transitions: tuple[Transitions, ...]
    scores: dict[str, Scores]
    heldout: dict[str, float]
    finite: np.ndarray


def run_iteration(
    job: Job, phases: Phases, frozen: Any, progress: Progress, timer: PhaseTimer
) -> tuple[Progress, dict[str, float]]:
    """One iteration; `frozen` are the parameters that are not trained.

    Raises:
      NotFiniteError: no image is finite.
      MissingScoreError: a score never came, and `rewards.on_missing` is "fail".
    """
    config, iteration = job.config, progress.iteration
    count, plan = config.prompts_per_iteration, job.plan_at(iteration)
    prompts = prompts_at(job.prompts, config.seed, progress.position, count)
    with hosts.agreed():
        conditioning = job.pipeline.encode(prompts)
    keys = prompt_keys(jax.random.fold_in(progress.key, iteration), 0, job.rollouts)
    prompts, conditioning = of_seeds(plan, prompts, conditioning)
    state = progress.state
    params = combine(state.trailing if config.learner.samples == "trailing" else state.params, frozen)
    samples = sample_and_score(job, phases, params, plan.schedule(), prompts, conditioning, keys, timer)
    check_samples(samples, iteration + 1, config.rewards)
    advantage, left_out = assign_credit(phases, config.rewards, samples.scores)
    weights = plan.step_weights(config.learner.step_weights).astype(np.float32)
    with timer.phase("update"):
        state, stats = jax.block_until_ready(
            phases.update(state, frozen, samples.transitions, advantage, weights, np.int32(iteration), conditioning)
        )

    numbers = reward_numbers(plan, samples.scores, samples.heldout, samples.finite)
    numbers |= update_numbers(advantage, stats, state)
    numbers |= {"groups": float(job.rollouts * len(plan.groups)), "groups_left_out": float(left_out)}
    return Progress(state, progress.key, iteration + 1, progress.position + count), numbers


def of_seeds(plan: Plan, prompts: list[str], conditioning: Any) -> tuple[list[str], Any]:
    """Prompts and their conditioning as those of rollouts, of which each prompt has one for each seed."""
    if plan.seeds == 1:
        return prompts, conditioning
    repeated = [prompt for prompt in prompts for _ in range(plan.seeds)]
    return repeated, jax.tree.map(lambda x: np.repeat(x, plan.seeds, axis=0), conditioning)


def sample_and_score(
    job: Job,
    phases: Phases,
    params: Any,
    schedule: Any,
    prompts: Sequence[str],
    conditioning: Any,
    keys: chex.Array,
    timer: PhaseTimer,
) -> Samples:
    """Rolls out so many prompts after another; scoring in the background goes on meanwhile."""
    at_once, deal = job.rollouts_at_once, phases.deal
    transitions, parts = [], []
    for first in range(0, len(prompts), at_once):
        rows = slice(first, first + at_once)
        with timer.phase("rollout"):
            inputs = jax.tree.map(lambda x: x[rows], (conditioning, keys))  # noqa: B023  # used at once
            rollout = jax.block_until_ready(phases.rollout(params, schedule, *inputs))
        with timer.phase("decode"):
            images = jax.block_until_ready(phases.decode(params, rollout.latents))
        with timer.phase("reward"), hosts.agreed(RewardError):
            parts.append(_hand_in(job, deal, images, prompts[rows]))
        transitions.append(rollout.transitions)
    with timer.phase("reward"):
        with hosts.agreed(RewardError):
            own = [_wait(part, len(deal.sample)) for part in parts]
        judged = hosts.total(own)
    shape = (at_once, len(job.plan.groups), len(job.plan.tail_solvers), job.plan.group_size)
    in_order = lambda parts: np.concatenate([_in_order(part, deal, shape) for part in parts])
    of = lambda name: [part.scores[name] for part in judged]
    seen = _scored(job, deal, train=False)
    only_seen = lambda scores: Scores(scores.values[seen], scores.came[seen])
    return Samples(
        transitions=jax.tree.map(lambda *parts: jnp.concatenate(parts), *transitions),
        scores={name: Scores(*map(in_order, zip(*of(name), strict=True))) for name in job.config.rewards.train},
        heldout={name: Scores.join([*map(only_seen, of(name))]).mean() for name in job.config.rewards.heldout},
        finite=in_order([part.finite for part in judged]),
    )


class _HandedIn(NamedTuple):
    """Images of a rollout that this process has handed in: for each reward, which of all rows, and their scores."""

    finite: np.ndarray
    rows: np.ndarray
    pending: dict[str, tuple[np.ndarray, Pending[Scores]]]


class _Judged(NamedTuple):
    """Of all M images of a rollout, in the order of its tails: if they are finite, `[M]`, and their scores."""

    finite: np.ndarray
    scores: dict[str, Scores]


def _scored(job: Job, deal: Deal, train: bool) -> np.ndarray:
    """Which images of a rollout are scored: all, or by held-out rewards the first of each group."""
    real, first = deal.sample >= 0, deal.sample % job.plan.group_size == 0
    return real if train else real & first


def _hand_in(job: Job, deal: Deal, images: jax.Array, prompts: Sequence[str]) -> _HandedIn:
    """Begins to score the images of `prompts` that this process's devices have made."""
    rows, own = hosts.own_rows(images)
    shown = np.array(prompts, object)[deal.sample[rows] // job.plan.decodes]
    pending = {}
    with hosts.alone(jax.sharding.get_mesh()):
        for name, reward in job.rewards.items():
            chosen = _scored(job, deal, name in job.config.rewards.train)[rows]
            judged = own if chosen.all() else jnp.take(own, np.flatnonzero(chosen), axis=0, mode="clip")
            scores = reward.start(judged, list(shown[chosen]))
            pending[name] = rows[chosen], scores
        return _HandedIn(np.asarray(finite_images(own)), rows, pending)


def _wait(part: _HandedIn, count: int) -> _Judged:
    """What is known of all `count` images once this process's own are scored."""
    scores = {name: hosts.placed(pending(), rows, count) for name, (rows, pending) in part.pending.items()}
    return _Judged(hosts.placed(part.finite, part.rows, count), scores)


def _in_order(values: np.ndarray, deal: Deal, shape: tuple[int, ...]) -> np.ndarray:
    """`values` of a rollout's images, in the order of `deal`, by the sample that each is of: `shape` (P, E, R, G)."""
    ordered, real = np.empty(shape, values.dtype), deal.sample >= 0
    ordered.ravel()[deal.sample[real]] = values[real]
    return ordered


def check_samples(samples: Samples, iteration: int, config: RewardsConfig) -> None:
    """Raises NotFiniteError if no image is finite, and MissingScoreError if scores of finite ones never came."""
    if not samples.finite.any():
        raise NotFiniteError(
            f"iteration {iteration}: none of its {samples.finite.size} images is finite: the policy, or the decoder in "
            "its dtype, has diverged; go back to an earlier checkpoint with a smaller learning rate"
        )
    missing = {name: int((samples.finite & ~scores.came).sum()) for name, scores in samples.scores.items()}
    if config.on_missing == "fail" and any(missing.values()):
        shown = ", ".join(f"{count} of {name}" for name, count in missing.items() if count)
        raise MissingScoreError(f"iteration {iteration}: scores never came: {shown}; rewards.on_missing is 'fail'")


def assign_credit(phases: Phases, config: RewardsConfig, scores: dict[str, Scores]) -> tuple[chex.Array, int]:
    """The advantages `[P, K, G]`, as plan and `rewards` have it, and the number of groups that lack a score.

    If all do, there is nothing to learn from: the advantages are nan, and the update is skipped.
    """
    values = {name: scores[name].values for name in config.train}
    came = np.stack([scores[name].came for name in config.train]).all(0)
    return jax.block_until_ready(phases.credit(values, came)), int((~complete_groups(came)).sum())
