"""The numbers that an iteration writes down, beside those of its evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.rewards import Scores
from egrpo_jax.rl.advantage import spread_within, zero_spread_share
from egrpo_jax.rl.optimizer import last_learning_rate
from egrpo_jax.rl.plan import Plan
from egrpo_jax.rl.update import TrainState, UpdateStats
from egrpo_jax.run.timing import PhaseTimer, peak_device_memory, peak_flops
from egrpo_jax.training.job import Job


def reward_numbers(
    plan: Plan, scores: Mapping[str, Scores], heldout: Mapping[str, float], finite: np.ndarray
) -> dict[str, float]:
    """Of each reward `[P, E, R, G]`: mean, std, the mean std within each kind of group, groups without spread, scores
    that never came; all else is of those that did. Images that are not `finite` are counted apart."""
    numbers: dict[str, Any] = {f"reward/{name}/mean": mean for name, mean in heldout.items()}
    for name, (values, came) in scores.items():
        mean, std, zero_spread, within = _spread(values, came)
        numbers[f"reward/{name}/mean"] = mean
        numbers[f"reward/{name}/std"] = std
        numbers[f"reward/{name}/zero_std_groups"] = zero_spread
        numbers[f"reward/{name}/missing"] = (finite & ~came).sum()
        for group, std in zip(plan.groups, np.asarray(within), strict=True):
            numbers[f"reward/{name}/std_{group}"] = std
    numbers["images_not_finite"] = (~finite).sum()
    return {name: float(value) for name, value in numbers.items()}


@jax.jit
def _spread(values: chex.Array, came: chex.Array) -> tuple[chex.Array, ...]:
    """Of scores `[P, E, R, G]` that came: mean, std, the share of groups without spread, the std within a group
    `[E]`."""
    shown = jnp.where(came, values, jnp.nan)
    return jnp.nanmean(shown), jnp.nanstd(shown), zero_spread_share(shown), spread_within(shown)


def update_numbers(advantage: chex.Array, stats: UpdateStats, state: TrainState) -> dict[str, float]:
    """Of the iteration's updates: means over them, the largest deviations of a ratio from 1, counters."""
    advantage, stats = jax.device_get((advantage, stats))
    numbers = {
        "loss": stats.loss.loss.mean(),
        "ratio/mean": 1 + stats.loss.ratio_excess.mean(),
        "ratio/max_deviation": stats.loss.ratio_deviation.max(),
        "ratio/on_policy_deviation": stats.loss.ratio_deviation[0],
        "ratio/rollout_deviation": stats.rollout_deviation[0],
        "clip/high": stats.loss.clip_high.mean(),
        "clip/low": stats.loss.clip_low.mean(),
        "kl": stats.loss.kl.mean(),
        "penalty": stats.loss.penalty.mean(),
        "advantage/std": advantage.std(),
        "advantage/max": abs(advantage).max(),
        "grad_norm": stats.grad_norm.mean(),
        "update_norm": stats.update_norm.mean(),
        "skipped_updates": state.skipped.in_all,
        "skipped_in_a_row": state.skipped.in_a_row,
        "learning_rate": last_learning_rate(state.opt_state),
        "updates": len(stats.grad_norm),
    }
    return {name: float(value) for name, value in numbers.items()}


def speed_numbers(job: Job, plan: Plan, timer: PhaseTimer, compiled: Sequence[float]) -> dict[str, float]:
    """Of an iteration of `plan`: seconds by phase, images a second, how many programs were `compiled` in how long.

    Where they are known, peak device memory and each phase's model FLOP utilisation (PaLM, arXiv:2204.02311, appendix
    B): the model's operations, without what remat repeats, by those of the devices' peak.
    """
    seconds = timer.take()
    images = job.config.prompts_per_iteration * plan.images
    speed = {
        "images_per_second": images / seconds["seconds/iteration"],
        "compilations": len(compiled),
        "seconds/compile": sum(compiled),
    }
    if (memory := peak_device_memory()) is not None:
        speed["peak_device_memory"] = memory
    if (peak := peak_flops(jax.devices()[0].device_kind)) is not None:
        most = peak * jax.device_count()
        speed |= {
            f"mfu/{phase}": flops / (seconds[f"seconds/{phase}"] * most)
            for phase, flops in _model_flops(job, plan).items()
        }
    return seconds | speed


def _model_flops(job: Job, plan: Plan) -> dict[str, float]:
    """Operations of an iteration's phases on all devices, of those where they are known."""
    pipeline, learner = job.pipeline, job.config.learner
    update = plan.update_equivalents(learner)
    of_a_prompt = {
        "rollout": (plan.rollout_passes, pipeline.forward_flops),
        "decode": (plan.images, pipeline.decode_flops),
        "update": (update, pipeline.forward_flops),
    }
    prompts = job.config.prompts_per_iteration
    return {phase: prompts * count * each for phase, (count, each) in of_a_prompt.items() if each is not None}
