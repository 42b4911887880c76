"""One training iteration: rollout, images, rewards, advantages, update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.common.trees import combine
from egrpo_jax.data.prompts import prompts_at
from egrpo_jax.rewards import start, with_nan
from egrpo_jax.rl.advantage import credit, groups_left_out, zero_spread_share
from egrpo_jax.rl.optimizer import last_learning_rate, skipped_updates
from egrpo_jax.rl.plan import Plan
from egrpo_jax.rl.rollout import Transitions, prompt_keys
from egrpo_jax.rl.update import TrainState, UpdateStats
from egrpo_jax.run.timing import PhaseTimer
from egrpo_jax.training.config import RewardsConfig, TrainConfig
from egrpo_jax.training.job import Job, Steps
from egrpo_jax.training.state import Progress


class MissingScoreError(RuntimeError):
    """A score never came, and the config says to stop then."""


def run_iteration(job: Job, steps: Steps, progress: Progress, timer: PhaseTimer) -> tuple[Progress, dict[str, float]]:
    """One iteration of E-GRPO: rollout, images, rewards, advantages, update."""
    config, iteration = job.config, progress.iteration
    count = config.prompts_per_iteration
    prompts = prompts_at(job.prompts, config.seed, progress.position, count)
    conditioning = job.pipeline.encode(prompts)
    keys = prompt_keys(jax.random.fold_in(progress.key, iteration), 0, count)
    params = combine(progress.state.params, job.frozen)

    transitions, scores, heldout = sample_and_score(job, steps, params, prompts, conditioning, keys, timer)
    missing = groups_left_out(scores)
    if config.rewards.on_missing == "fail" and missing:
        raise MissingScoreError(missing_line(iteration, scores))
    advantage = jax.block_until_ready(assign_credit(config.rewards, scores))
    with timer.phase("update"):
        state, stats = jax.block_until_ready(
            steps.update(progress.state, job.frozen, transitions, advantage, conditioning)
        )

    metrics = reward_metrics(job.plan, scores) | {f"reward/{name}/mean": mean for name, mean in heldout.items()}
    metrics |= update_metrics(config, advantage, stats, state) | {"groups_left_out": float(missing)}
    return Progress(state, progress.key, iteration + 1, progress.position + count), metrics


def sample_and_score(
    job: Job, steps: Steps, params: Any, prompts: Sequence[str], conditioning: Any, keys: chex.Array, timer: PhaseTimer
) -> tuple[Transitions, dict[str, chex.Array], dict[str, float]]:
    """Rolls out `prompts_per_rollout` prompts after another; scoring in the background goes on meanwhile.

    Returns:
      The transitions, `[E, P, ...]`; the scores of each reward that is trained on, `[P, E, R, G]`; and the mean of each
      held-out one over one sample of every group: it shows hacking early, and costs little.
    """
    config, each = job.config.rewards, job.plan.group_size
    at_once = job.config.prompts_per_rollout or len(prompts)
    parts, pending = [], []
    for first in range(0, len(prompts), at_once):
        rows = slice(first, first + at_once)
        with timer.phase("rollout"):
            inputs = jax.tree.map(lambda x: x[rows], (conditioning, keys))  # noqa: B023  # used at once
            transitions, latents = jax.block_until_ready(steps.rollout(params, *inputs))
        with timer.phase("decode"):
            pictures = jax.block_until_ready(steps.decode(params, latents.reshape(-1, *latents.shape[-2:])))
        with timer.phase("reward"):
            shown = [prompt for prompt in prompts[rows] for _ in range(job.plan.decodes)]
            scored = {name: start(job.rewards[name], pictures, shown) for name in config.train}
            watched = {name: start(job.rewards[name], pictures[::each], shown[::each]) for name in config.heldout}
        parts.append(transitions)
        pending.append((scored, watched))
    with timer.phase("reward"):
        trained = {name: jnp.concatenate([with_nan(scores[name]()) for scores, _ in pending]) for name in config.train}
        heldout = {
            name: jnp.concatenate([with_nan(scores[name]()) for _, scores in pending]) for name in config.heldout
        }
        shape = (len(prompts), *latents.shape[1:-2])
        scores = jax.block_until_ready({name: values.reshape(shape) for name, values in trained.items()})
    means = {name: float(jnp.nanmean(values)) for name, values in heldout.items()}
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts), scores, means


def assign_credit(config: RewardsConfig, scores: dict[str, chex.Array]) -> chex.Array:
    """The advantages `[E, P, G]`, as the section `rewards` has it."""
    weights = dict(zip(config.train, config.weights, strict=True))
    clips = dict(zip(config.train, config.clips, strict=True)) if config.clips else {}
    return credit(scores, weights, config.combination, clips)


def missing_line(iteration: int, scores: dict[str, chex.Array]) -> str:
    """Which scores never came."""
    counts = {name: int(jnp.isnan(values).sum()) for name, values in scores.items()}
    shown = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
    return f"iteration {iteration + 1}: scores never came: {shown}; config.rewards.on_missing is 'fail'"


def reward_metrics(plan: Plan, scores: dict[str, chex.Array]) -> dict[str, float]:
    """Of each reward `[P, E, R, G]`: mean, std, the mean std within a group by active step, groups without spread,
    scores that never came; all else is of those that did."""
    metrics: dict[str, Any] = {}
    for name, values in scores.items():
        within = jnp.nanmean(values.std(-1, ddof=1), (0, 2))
        metrics[f"reward/{name}/mean"] = jnp.nanmean(values)
        metrics[f"reward/{name}/std"] = jnp.nanstd(values)
        metrics[f"reward/{name}/zero_std_groups"] = zero_spread_share(values)
        metrics[f"reward/{name}/missing"] = jnp.isnan(values).sum()
        for branch, std in zip(plan.branches, within, strict=True):
            metrics[f"reward/{name}/std_step_{branch.step}"] = std
    return {name: float(value) for name, value in metrics.items()}


def update_metrics(
    config: TrainConfig, advantage: chex.Array, stats: UpdateStats, state: TrainState
) -> dict[str, float]:
    """Of the iteration's updates: means over them, the largest deviation of a ratio from 1, counters."""
    skipped_in_a_row, skipped = skipped_updates(state.opt_state)
    updates_per_iteration = stats.grad_norm.shape[0]
    metrics = {
        "loss": stats.loss.loss.mean(),
        "ratio/mean": stats.loss.ratio.mean(),
        "ratio/max_deviation": stats.loss.ratio_deviation.max(),
        "ratio/on_policy_deviation": stats.loss.ratio_deviation[0],
        "clip/high": stats.loss.clip_high.mean(),
        "clip/low": stats.loss.clip_low.mean(),
        "kl": stats.loss.kl.mean(),
        "advantage/std": advantage.std(),
        "advantage/max": abs(advantage).max(),
        "grad_norm": stats.grad_norm.mean(),
        "update_norm": stats.update_norm.mean(),
        "skipped_updates": skipped,
        "skipped_in_a_row": skipped_in_a_row,
        "learning_rate": last_learning_rate(config.optim, state.opt_state),
        "updates": updates_per_iteration,
    }
    return {name: float(value) for name, value in metrics.items()}
