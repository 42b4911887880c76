"""All that is measured of a model, its rewards and its random steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from egrpo_jax.analysis import estimates
from egrpo_jax.analysis.estimates import Agreement, Estimate
from egrpo_jax.analysis.gradients import step_agreements
from egrpo_jax.analysis.probe import Form, ProbePlan, cheaper_tails
from egrpo_jax.analysis.sampling import (
    Replicate,
    Sampling,
    Tails,
    attention_along_anchor,
    in_bfloat16,
    make_tails,
    perturbed,
    rounded,
    stacked,
    walk_again,
)
from egrpo_jax.flow.solver import Euler, tail_steps
from egrpo_jax.rl.plan import Branch
from egrpo_jax.training.job import Job
from egrpo_jax.training.phases import make_phases


class Floor(NamedTuple):
    """By how much a score changes (root mean square) where nothing that matters has: below it there is no signal.

    Attributes:
      rounding: of images to 8 bits.
      perturbation: of images by noise as large.
      batch: of the tails' passes to others of half as many samples.
    """

    rounding: float
    perturbation: float
    batch: float


@dataclasses.dataclass(frozen=True)
class RewardStudy:
    """A reward where one step alone is random.

    Attributes:
      mean: over all samples.
      spread: standard deviation within groups.
      odd_share: of the variance, the share that changes its sign with the noise: what a gradient can use.
      correlations: within groups with other rewards, by name.
    """

    mean: float
    spread: Estimate
    odd_share: Estimate
    correlations: Mapping[str, Estimate]


@dataclasses.dataclass(frozen=True)
class StepStudy:
    """A random step.

    Attributes:
      branch: where it is on the grid, and its entropy.
      time, next_time, std: of its kernel.
      kappa: J/std, how much its log-density moves with the velocity: its weight in the loss as it is.
      attention: the mean entropy of the model's attention at the anchor's states there, by that of uniform weights; nan
        if it has none.
      distance: of an image from the mean of its group, the root mean square.
      gradient: of the policy, of this step alone.
      rewards: by name.
    """

    branch: Branch
    time: float
    next_time: float
    std: float
    kappa: float
    attention: float
    distance: float
    gradient: Agreement
    rewards: Mapping[str, RewardStudy]


class TailStudy(NamedTuple):
    """Tails that are cheaper than the full ones, or otherwise different.

    Attributes:
      passes: of the model, by those of full tails.
      ranks: rank correlation within groups of the training reward with that after full tails.
    """

    name: str
    passes: float
    ranks: Estimate


@dataclasses.dataclass(frozen=True)
class FormStudy:
    """A kernel, and the `settings` of its `Form`."""

    name: str
    settings: Mapping[str, Any]
    steps: Sequence[StepStudy]
    tails: Sequence[TailStudy]
    floors: Mapping[str, Floor]


class Sizes(NamedTuple):
    """The size of an analysis: rollouts with noise of their own, and how many of them get other tails too."""

    replicates: int
    tail_replicates: int


def study_form(
    job: Job, form: Form, params: Any, stale: Any, prompts: Sequence[str], sizes: Sizes, done: Callable[[], None]
) -> FormStudy:
    """Measures a kernel.

    Args:
      job: of the config.
      params: of the policy, all of them.
      stale: those of an older policy; None if there is none.
      prompts: as many as `job.config.prompts_per_iteration`.
      sizes: of the analysis.
      done: called after each of `count_work` pieces.
    """
    job = dataclasses.replace(job, plan=form.plan)
    sampling = Sampling(job, make_phases(job), params, prompts, job.pipeline.encode(prompts))
    replicates, floors = [], {}
    for index in range(sizes.replicates):
        replicate, images = sampling.roll_out(index)
        if index == 0:
            floors = _floors(sampling, replicate, images)
        replicates.append(replicate)
        done()
    scores = stacked([replicate.scores for replicate in replicates])
    tails = _tails(sampling, form.plan, stale, scores, sizes.tail_replicates, done)
    gradients = step_agreements(sampling, replicates, done)
    distance = np.mean([replicate.distance for replicate in replicates], axis=(0, 1))
    attention = attention_along_anchor(sampling, replicates[0])
    steps = [
        _step(job, form.plan, index, scores, float(attention[index]), float(distance[index]), gradients[index])
        for index in range(len(form.plan.branches))
    ]
    return FormStudy(form.name, form.settings, steps, tails, floors)


def count_work(form: Form, sizes: Sizes) -> int:
    """Pieces of work of a kernel, for a progress bar."""
    return sizes.replicates + sizes.tail_replicates + len(form.plan.branches)


def _step(
    job: Job,
    plan: ProbePlan,
    index: int,
    scores: Mapping[str, np.ndarray],
    attention: float,
    distance: float,
    gradient: Agreement,
) -> StepStudy:
    branch = plan.branches[index]
    here = {name: values[:, :, index].astype(np.float64) for name, values in scores.items()}
    times = plan.times[branch.step], plan.times[branch.stop]
    std = float(plan.process.std(*times, branch.noise))
    kappa = float(plan.process.jacobian(*times, branch.noise)) / std
    rewards = {
        name: RewardStudy(
            float(values.mean()),
            estimates.spread(values),
            estimates.odd_share(values),
            {other: estimates.correlation(values, here[other]) for other in here if other != name},
        )
        for name, values in here.items()
        if name in job.config.rewards.train
    }
    return StepStudy(branch, *times, std, kappa, attention, distance, gradient, rewards)


def _floors(sampling: Sampling, replicate: Replicate, images: Sequence[jax.Array]) -> dict[str, Floor]:
    """Of the training rewards, from one replicate."""
    changed = []
    for change in (rounded, perturbed):
        parts = [sampling.score(change(x), rows) for x, rows in zip(images, sampling.parts(), strict=True)]
        changed.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    other = walk_again(sampling, make_tails(sampling.job, (Euler(),), fewer_slots=True), sampling.params, 0)
    changed.append({name: values[:, :, 0] for name, values in other.items()})
    floors = {}
    for name in sampling.job.config.rewards.train:
        whole, half = replicate.scores[name], replicate.scores[name][..., ::2]
        apart = [scores[name] - (whole if scores[name].shape == whole.shape else half) for scores in changed]
        floors[name] = Floor(*(float(np.sqrt(np.mean(difference**2))) for difference in apart))
    return floors


def _tails(
    sampling: Sampling,
    plan: ProbePlan,
    stale: Any,
    scores: Mapping[str, np.ndarray],
    replicates: int,
    done: Callable[[], None],
) -> list[TailStudy]:
    """Cheaper tails, and full ones of other weights, of the first replicates."""
    solvers, job = cheaper_tails(sampling.job.config.plan, plan), sampling.job
    total = job.config.rewards.total
    others = {"weights in bfloat16": in_bfloat16(sampling.params)} | ({} if stale is None else {"base weights": stale})
    cheaper, full = make_tails(job, tuple(solvers.values())), make_tails(job, (Euler(),))
    again: list[np.ndarray] = []
    for index in range(replicates):
        walked: list[tuple[Tails, Any]] = [(cheaper, sampling.params)] if solvers else []
        walked += [(full, params) for params in others.values()]
        found = [total(walk_again(sampling, *each, index)) for each in walked]
        again.append(np.concatenate(found, axis=2))
        done()
    reference = total(scores)[:replicates, ..., ::2]
    lengths = [tail_steps(Euler(), plan.times, branch.stop) for branch in plan.branches]
    shares = [
        sum(tail_steps(solver, plan.times, branch.stop) for branch in plan.branches) / max(1, sum(lengths))
        for solver in solvers.values()
    ]
    walkable = np.array(lengths) > 1  # a tail of one step is the same by all solvers
    units = lambda values: values[:, :, walkable].reshape(-1, *values[:, :, walkable].shape[2:])
    return [
        TailStudy(name, share, estimates.rank_correlation(units(one), units(reference)))
        for name, share, one in zip(
            [*solvers, *others],
            [*shares, *[1.0] * len(others)],
            np.moveaxis(np.stack(again), 3, 0),
            strict=True,
        )
    ]
