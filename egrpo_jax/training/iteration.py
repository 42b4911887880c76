"""One training iteration: rollout, images, rewards, advantages, update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.trees import combine
from egrpo_jax.data.prompts import prompts_at
from egrpo_jax.parallel import hosts
from egrpo_jax.rewards import RewardError, Scores
from egrpo_jax.rl.adaptive import AdaptivePlan, Memory
from egrpo_jax.rl.advantage import complete_groups, spread_within
from egrpo_jax.rl.plan import Deal, Plan
from egrpo_jax.rl.transitions import Transitions, prompt_keys
from egrpo_jax.run.timing import PhaseTimer
from egrpo_jax.training.config import RewardsConfig
from egrpo_jax.training.job import Job
from egrpo_jax.training.numbers import reward_numbers, update_numbers
from egrpo_jax.training.phases import Phases
from egrpo_jax.training.scoring import DIVERSITY, group_distance, hand_in, in_order, wait
from egrpo_jax.training.screening import Given, choose_prompts, updated
from egrpo_jax.training.state import Progress, Running


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
    memory = None
    if isinstance(plan, AdaptivePlan):
        memory = progress.memory or plan.begin()
        plan = plan.at(memory)
    count *= plan.candidates
    prompts = prompts_at(job.prompts, config.seed, progress.position, count)
    with hosts.agreed():
        conditioning = job.pipeline.encode(prompts)
    keys = prompt_keys(jax.random.fold_in(progress.key, iteration), 0, count * plan.seeds)
    given = Given(*of_seeds(plan, prompts, conditioning), keys)
    state = progress.state
    params = combine(state.trailing if config.learner.samples == "trailing" else state.params, frozen)
    if plan.candidates > 1:
        given = choose_prompts(job, phases, params, given, progress.running, timer)
    samples = sample_and_score(job, phases, params, plan.schedule(), given, timer)
    check_samples(samples, iteration + 1, config.rewards)
    running = updated(progress.running, job, samples.scores) if plan.candidates > 1 else None
    advantage, left_out = assign_credit(phases, config.rewards, samples.scores, progress.running or running)
    conditioning = given.conditioning
    del given, params  # an update needs the room
    weights = plan.step_weights(config.learner.step_weights).astype(np.float32)
    with timer.phase("update"):
        state, stats = jax.block_until_ready(
            phases.update(state, frozen, samples.transitions, advantage, weights, np.int32(iteration), conditioning)
        )

    numbers = reward_numbers(plan, samples.scores, samples.heldout, samples.finite)
    if memory is not None:
        numbers |= {f"noise/{group}": noise for group, noise in zip(plan.groups, memory.noise, strict=True)}
        memory = learnt(job, memory, samples.scores)
    numbers |= update_numbers(advantage, stats, state)
    numbers |= {"groups": float(job.rollouts * len(plan.groups)), "groups_left_out": float(left_out)}
    return Progress(state, progress.key, iteration + 1, progress.position + count, running, memory), numbers


def learnt(job: Job, memory: Memory, scores: Mapping[str, Scores]) -> Memory:
    """The memory of a plan whose noise adapts, after an iteration's scores."""
    assert isinstance(job.plan, AdaptivePlan)  # which alone has one
    config = job.config.rewards
    total = config.total({name: scores[name].with_nan() for name in config.train})
    return job.plan.learn(memory, np.asarray(spread_within(total)))


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
    given: Given,
    timer: PhaseTimer,
) -> Samples:
    """Rolls out so many prompts after another; scoring in the background goes on meanwhile."""
    at_once, deal = job.rollouts_at_once, phases.deal
    scored = {name: _scored(job, deal, name in job.config.rewards.train) for name in job.rewards}
    transitions, parts = [], []
    for first in range(0, len(given.prompts), at_once):
        rows = slice(first, first + at_once)
        with timer.phase("rollout"):
            inputs = jax.tree.map(lambda x: x[rows], (given.conditioning, given.keys))  # noqa: B023  # used at once
            if given.anchors:
                all_anchors, places = given.anchors
                inputs = (inputs[0], phases.take(all_anchors, places[rows])), inputs[1]
            rollout = jax.block_until_ready(phases.rollout(params, schedule, *inputs))
        with timer.phase("decode"):
            images = jax.block_until_ready(phases.decode(params, rollout.latents))
        with timer.phase("reward"), hosts.agreed(RewardError):
            shown = np.array(given.prompts[rows], object)[deal.sample // job.plan.decodes]
            parts.append(hand_in(job, images, shown, scored, job.config.rewards.diversity_by))
        transitions.append(rollout.transitions)
    with timer.phase("reward"):
        with hosts.agreed(RewardError):
            own = [wait(part, len(deal.sample)) for part in parts]
        judged = hosts.total(own)
    shape = (at_once, len(job.plan.groups), len(job.plan.tail_solvers), job.plan.group_size)
    ordered = lambda parts: np.concatenate([in_order(part, deal, shape) for part in parts])
    of = lambda name: [part.scores[name] for part in judged]
    seen = _scored(job, deal, train=False)
    only_seen = lambda scores: Scores(scores.values[seen], scores.came[seen])
    scores = {name: Scores(*map(ordered, zip(*of(name), strict=True))) for name in job.config.rewards.train}
    finite = ordered([part.finite for part in judged])
    if job.config.rewards.diversity:
        scores[DIVERSITY] = group_distance(ordered([part.features for part in judged]), finite)
    return Samples(
        transitions=jax.tree.map(lambda *parts: jnp.concatenate(parts), *transitions),
        scores=scores,
        heldout={name: Scores.join([*map(only_seen, of(name))]).mean() for name in job.config.rewards.heldout},
        finite=finite,
    )


def _scored(job: Job, deal: Deal, train: bool) -> np.ndarray:
    """Which images of a rollout are scored: all, or by held-out rewards the first of each group."""
    real, first = deal.sample >= 0, deal.sample % job.plan.group_size == 0
    return real if train else real & first


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


def assign_credit(
    phases: Phases, config: RewardsConfig, scores: dict[str, Scores], running: Running | None = None
) -> tuple[chex.Array, int]:
    """The advantages `[P, K, G]`, as plan and `rewards` have it, and the number of groups that lack a score.

    If all do, there is nothing to learn from: the advantages are nan, and the update is skipped.
    """
    names = (*config.train, DIVERSITY) if config.diversity else config.train
    values = {name: scores[name].values for name in names}
    came = np.stack([scores[name].came for name in names]).all(0)
    return jax.block_until_ready(phases.credit(values, came, running)), int((~complete_groups(came)).sum())
