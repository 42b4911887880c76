"""The rollouts of an analysis: what came of making each step random, for several replicates of the noise."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.errors import UserError
from egrpo_jax.flow.solver import Solver
from egrpo_jax.models.attention import recorded_entropy
from egrpo_jax.parallel.fsdp import Layout
from egrpo_jax.parallel.mesh import compiled, over_samples, sample_devices, spread
from egrpo_jax.rl.deal import deal_prompts, default_slots
from egrpo_jax.rl.plan import AnchorPlan, Deal
from egrpo_jax.rl.rollout import walk_tails
from egrpo_jax.rl.transitions import Transitions, prompt_keys
from egrpo_jax.training.job import Job
from egrpo_jax.training.phases import Phases, take_rows
from egrpo_jax.training.scoring import hand_in, in_order, wait

SMALL = 64
"""Most pixels of a side, for the spread of images."""


class Replicate(NamedTuple):
    """A rollout.

    Attributes:
      scores: of each reward `[P, E, G]`.
      distance: of images, made small, from the mean of their group: the root mean square, `[P, E]`.
      transitions: of the first of each pair, on the host: `[P, E, G]`, with the other half left out.
    """

    scores: dict[str, np.ndarray]
    distance: np.ndarray
    transitions: Transitions


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Prompts and noise of an analysis.

    Attributes:
      job: its plan a `ProbePlan`.
      phases: of the job.
      params: all of them.
      prompts: P of them.
      conditioning: of these.
    """

    job: Job
    phases: Phases
    params: Any
    prompts: Sequence[str]
    conditioning: Any

    def keys(self, replicate: int) -> chex.Array:
        """Of the prompts' noise: the anchors and branches of a replicate."""
        key = jax.random.fold_in(jax.random.key(self.job.config.seed), replicate)
        return prompt_keys(key, 0, len(self.prompts))

    def parts(self) -> list[slice]:
        """The prompts that are rolled out together."""
        at_once = self.job.rollouts_at_once
        return [slice(first, first + at_once) for first in range(0, len(self.prompts), at_once)]

    def roll_out(self, replicate: int) -> tuple[Replicate, list[jax.Array]]:
        """A replicate, and the images that its scores are of, in the order of the deal."""
        parts, shown = [], []
        for rows in self.parts():
            conditioning, keys = jax.tree.map(lambda x, rows=rows: x[rows], (self.conditioning, self.keys(replicate)))
            rollout = self.phases.rollout(self.params, (), conditioning, keys)
            images = self.phases.decode(self.params, rollout.latents)
            half = jax.device_get(_first_of_pairs(rollout.transitions[0]))
            parts.append(Replicate(self.score(images, rows), self._distance(images), half))
            shown.append(images)
        scores = {name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores}
        transitions = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(part.transitions for part in parts))
        return Replicate(scores, np.concatenate([part.distance for part in parts]), transitions), shown

    def score(self, images: jax.Array, rows: slice) -> dict[str, np.ndarray]:
        """Every reward of full tails' images, `[P, E, G]`."""
        scores = judge(self.job, self.phases.deal, images, self.prompts[rows])
        return {name: values[:, :, 0] for name, values in scores.items()}

    def _distance(self, images: jax.Array) -> np.ndarray:
        plan, shape = self.job.plan, images.shape[1:]
        side = min(SMALL, *shape[:2])
        small = np.asarray(jax.image.resize(images, (len(images), side, side, 3), "linear"))
        ordered = in_order(small, self.phases.deal, (self.job.rollouts_at_once, len(plan.branches), 1, plan.group_size))
        apart = ordered[:, :, 0] - ordered[:, :, 0].mean(2, keepdims=True)
        return np.sqrt((apart**2).mean((2, 3, 4, 5)))


def attention_along_anchor(sampling: Sampling, replicate: Replicate) -> np.ndarray:
    """The mean entropy of all attention at the states of a replicate's anchors, by that of uniform weights: `[E]`.

    nan for a model that has no attention of `models.attention`.
    """
    heard: list[float] = []
    pipeline, found = sampling.job.pipeline, []
    with recorded_entropy(lambda entropy: heard.append(float(entropy))):
        walk = jax.jit(lambda params, *inputs: pipeline.velocity(params, *inputs))
        for step in range(len(sampling.job.plan.branches)):
            latents, time = (
                jnp.asarray(x[:, step]) for x in (replicate.transitions.latents, replicate.transitions.time)
            )
            jax.block_until_ready(walk(sampling.params, latents, time, sampling.conditioning))
            jax.effects_barrier()
            found.append(np.mean(heard) if heard else np.nan)
            heard.clear()
    return np.array(found)


def judge(job: Job, deal: Deal, images: jax.Array, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """The scores of images in the order of a deal by every reward, `[P, E, R, G]`.

    Raises:
      UserError: one never came.
    """
    real, plan = deal.sample >= 0, job.plan
    shown = np.array(prompts, object)[np.maximum(deal.sample, 0) // plan.decodes]
    judged = wait(hand_in(job, images, shown, dict.fromkeys(job.rewards, real)), len(real))
    for name, found in judged.scores.items():
        if missing := int((real & ~found.came).sum()):
            expected = "finite numbers: an analysis compares all samples of a group"
            raise UserError(f"the reward {name!r} scored all but {missing} of {real.sum()} images, expected {expected}")
    shape = (len(prompts), len(plan.branches), len(plan.tail_solvers), plan.group_size)
    return {name: in_order(found.values, deal, shape) for name, found in judged.scores.items()}


def _first_of_pairs(transitions: Transitions) -> Transitions:
    own = {name: getattr(transitions, name)[:, :, ::2] for name in ("next_latents", "log_prob", "sample")}
    return transitions._replace(**own)


class Tails(NamedTuple):
    """Other tails of the same branches, of the first of each pair.

    Attributes:
      job: whose plan has them.
      deal: of them.
      walk: `(params, starts [P, E, G / 2, N, D], conditioning)` to latents, in the order of `deal`.
    """

    job: Job
    deal: Deal
    walk: Callable[[Any, chex.Array, Any], chex.Array]


def make_tails(job: Job, solvers: Sequence[Solver], fewer_slots: bool = False) -> Tails:
    """Tails of a `ProbePlan` by `solvers`; `fewer_slots`: each pass of the model is of about half as many samples."""
    plan = dataclasses.replace(job.plan, tail_solvers=tuple(solvers), group_size=job.plan.group_size // 2)
    assert isinstance(plan, AnchorPlan)  # a `ProbePlan` is
    workers, slots = sample_devices(), job.config.tails_per_device
    if fewer_slots:
        slots = -(-(slots or default_slots(plan, job.rollouts_at_once, workers)) // 2)
    job, deal = dataclasses.replace(job, plan=plan), plan.deal(job.rollouts_at_once, workers, slots)
    layout = Layout.of(job.pipeline.abstract(jax.sharding.get_mesh()), job.pipeline.dtype)
    return Tails(job, deal, compiled(functools.partial(_walk, job, plan, layout, deal)))


def _walk(
    job: Job, plan: AnchorPlan, layout: Layout, deal: Any, params: Any, starts: chex.Array, conditioning: Any
) -> chex.Array:
    def walk(params: Any, deal: Any, starts: chex.Array, conditioning: Any) -> chex.Array:
        velocity = lambda params, *inputs: job.pipeline.velocity(layout.boxed(params), *inputs)
        return walk_tails(velocity, params, plan, deal, starts, conditioning)

    rows = deal_prompts(len(starts), sample_devices()).ravel()
    tables = jax.tree.map(over_samples, deal.worker_axes())
    walked = spread(walk, (layout.specs, tables, over_samples(), over_samples()), over_samples())
    return walked(layout.working_copy(params), deal, *take_rows((starts, conditioning), rows))


def walk_again(sampling: Sampling, tails: Tails, params: Any, replicate: int) -> dict[str, np.ndarray]:
    """Every reward of a replicate's branches with other tails, by `params`: `[P, E, R, G / 2]`."""
    found = []
    for rows in sampling.parts():
        conditioning, keys = jax.tree.map(
            lambda x, rows=rows: x[rows], (sampling.conditioning, sampling.keys(replicate))
        )
        rollout = sampling.phases.rollout(sampling.params, (), conditioning, keys)
        latents = tails.walk(params, _first_of_pairs(rollout.transitions[0]).next_latents, conditioning)
        images = sampling.phases.decode(sampling.params, latents)
        found.append(judge(tails.job, tails.deal, images, sampling.prompts[rows]))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def rounded(images: jax.Array) -> jax.Array:
    """Images as 8 bits keep them."""
    return jnp.round(images * 255) / 255


def perturbed(images: jax.Array) -> jax.Array:
    """Images with noise as large as such a rounding: uniform within half a level."""
    noise = jax.random.uniform(jax.random.key(0), images.shape, images.dtype, -0.5, 0.5) / 255
    return jnp.clip(images + noise, 0, 1)


def in_bfloat16(params: Any) -> Any:
    """Parameters rounded to bfloat16, in the dtype that they had."""
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype) if is_float(x) else x, params)


def stacked(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Scores of replicates with a leading axis."""
    return {name: np.stack([part[name] for part in parts]) for name in parts[0]}
