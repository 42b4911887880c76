"""Trains a flow model by E-GRPO: `python -m egrpo_jax.train --config configs/emoji.py`.

Resumes by itself from its workdir. There: `config.json`, `metrics.jsonl`, `tb/` (TensorBoard), `eval/` (scores and
picture grids), `checkpoints/`, and at the end `reward_curve.png`, `entropy.png`, `before_after.png`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import flags
from jax.sharding import Mesh
from PIL import Image

from egrpo_jax import cli, images, plots
from egrpo_jax.checkpoint import Checkpoints, PreemptionGuard, claim_workdir
from egrpo_jax.config import ConfigError, from_config_dict, to_config_dict
from egrpo_jax.data.prompts import prompts_at, read_prompts
from egrpo_jax.evaluation import (
    Evaluation,
    Sampler,
    evaluation_metrics,
    even_places,
    load_evaluations,
    make_evaluation,
    mean_score,
    parted_rewards,
    save_evaluation,
)
from egrpo_jax.metrics import MetricsWriter, PhaseTimer, peak_device_memory, peak_flops, read_metrics
from egrpo_jax.parallel.mesh import DATA, REPLICATED, make_mesh, over_data, spread
from egrpo_jax.parallel.rules import lay_out
from egrpo_jax.pipelines import Pipeline, load_pipeline
from egrpo_jax.progress import Progress, first_progress, policy_params, restore, save
from egrpo_jax.rewards import Reward, load_reward, start
from egrpo_jax.rl.advantage import credit, groups_left_out, zero_spread_share
from egrpo_jax.rl.optimizer import last_learning_rate, make_optimizer, skipped_updates
from egrpo_jax.rl.plan import Plan, describe, make_plan
from egrpo_jax.rl.rollout import Rollout, Transitions, prompt_keys, roll_out
from egrpo_jax.rl.update import TrainState, UpdateStats, update
from egrpo_jax.train_config import RewardsConfig, TrainConfig
from egrpo_jax.trees import combine, partition

WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; by default runs/<config.name>.")
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on with a workdir that was made with another config."
)

SHOWN = 16
"""Pictures on a grid."""
EVALUATION_SEED = 2**31 - 1
"""Folded into the seed for the fixed noise of evaluations; no iteration has this number."""


class NotFiniteError(RuntimeError):
    """Too many updates in a row were skipped because loss or gradient was not finite."""


class MissingScoreError(RuntimeError):
    """A score never came, and the config says to stop then."""


@dataclasses.dataclass(frozen=True)
class Job:
    """All that stays the same during a run; `frozen` are the parameters that are not trained."""

    config: TrainConfig
    plan: Plan
    pipeline: Pipeline
    rewards: dict[str, Reward]
    prompts: list[str]
    evaluation_prompts: list[str]
    optimizer: optax.GradientTransformation
    frozen: Any


class Steps(NamedTuple):
    """The compiled phases of an iteration."""

    rollout: Callable[[Any, Any, chex.Array], Rollout]
    decode: Callable[[Any, chex.Array], chex.Array]
    update: Callable[..., tuple[TrainState, UpdateStats]]


def make_job(config: TrainConfig, mesh: Mesh) -> tuple[Job, Any]:
    """Loads what `config` names; whatever is wrong with it comes out here, before anything is compiled.

    Returns:
      The job, and the parameters that it trains; all parameters lie on `mesh`.
    """
    plan = make_plan(config.plan)
    prompts, evaluation_prompts = read_prompts(config.prompts), read_prompts(config.evaluation.prompts)
    rewards = {name: load_reward(name, config.scorers, mesh) for name in config.rewards.train + config.rewards.heldout}
    pipeline = load_pipeline(config.model, mesh)
    pipeline.require([*prompts, *evaluation_prompts])
    trained, frozen = partition(pipeline.params, pipeline.trainable)
    optimizer = make_optimizer(config.optim)
    return Job(config, plan, pipeline, rewards, prompts, evaluation_prompts, optimizer, frozen), trained


def make_steps(job: Job) -> Steps:
    """The phases for the mesh that is set: prompts spread over `data`, parameters as they are."""
    devices = jax.sharding.get_abstract_mesh().shape[DATA]
    key = "prompts_per_iteration" if job.config.prompts_per_rollout is None else "prompts_per_rollout"
    if getattr(job.config, key) % devices:
        expected = f"a multiple of the {devices} devices on the mesh axis {DATA}"
        raise ConfigError(key, getattr(job.config, key), expected)
    pipeline = job.pipeline
    per_step = over_data(axis=1)
    rollout = spread(
        lambda params, conditioning, keys: roll_out(
            pipeline.velocity, params, job.plan, conditioning, keys, pipeline.latents_shape
        ),
        (REPLICATED, over_data(), over_data()),
        Rollout(per_step, over_data()),  # type: ignore[arg-type]  # specs in place of arrays
    )
    decode = spread(pipeline.decode, (REPLICATED, over_data()), over_data())

    def step(
        state: TrainState, frozen: Any, transitions: Transitions, advantage: chex.Array, conditioning: Any
    ) -> tuple[TrainState, UpdateStats]:
        velocity = lambda trained, *inputs: pipeline.velocity(combine(trained, frozen), *inputs)
        return update(
            velocity, job.optimizer, job.config.learner, state, transitions, advantage, conditioning, axis_name=DATA
        )

    in_specs = (REPLICATED, REPLICATED, per_step, per_step, over_data())
    return Steps(rollout, decode, spread(step, in_specs, (REPLICATED, REPLICATED), donate=(0,)))


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
        trained = {name: jnp.concatenate([scores[name]() for scores, _ in pending]) for name in config.train}
        heldout = {name: jnp.concatenate([scores[name]() for _, scores in pending]) for name in config.heldout}
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


def evaluate(
    job: Job, sampler: Sampler, progress: Progress, history: list[Evaluation], workdir: Path
) -> dict[str, float]:
    """Evaluates the parameters (their average where one is kept), adds to `history`, writes scores and grid."""
    key = jax.random.fold_in(jax.random.key(job.config.seed), EVALUATION_SEED)
    prompts = job.evaluation_prompts
    pictures = sampler(combine(policy_params(progress.state), job.frozen), prompts, key)
    history.append(make_evaluation(progress.iteration, job.rewards, pictures, prompts, job.config.evaluation.kept))
    save_evaluation(workdir, history[-1])
    kept = kept_prompts(job)
    shown = even_places(len(kept), SHOWN)
    sheet = images.grid(_floats(history[-1])[shown], math.ceil(math.sqrt(len(shown))), [kept[i] for i in shown])
    images.save_png(sheet, workdir / "eval" / f"{progress.iteration:06d}.png")
    for line in parted_rewards(history, job.config.rewards.train, job.config.rewards.heldout):
        tqdm.tqdm.write(f"warning: iteration {progress.iteration}: {line}", file=sys.stderr)
    return evaluation_metrics(history[0], history[-1])


def train(config: TrainConfig, workdir: Path, allow_config_change: bool = False) -> int | None:
    """Runs or resumes training in `workdir`; returns the signal that ended it early, or None at its end."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), PreemptionGuard() as guard:
        job, trained = make_job(config, mesh)
        claim_workdir(workdir, to_config_dict(config).to_dict(), allow_config_change)
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a restarted run compiles nothing anew
            jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compilation_cache"))
        print(describe(job.plan), flush=True)
        checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
        start = first_progress(trained, job.optimizer, config)
        start = start._replace(state=lay_out(mesh, job.pipeline.rules, start.state))
        progress = restore(checkpoints, start)
        for damaged in checkpoints.damaged:
            print(f"warning: a damaged checkpoint was moved to {damaged}", file=sys.stderr)
        try:
            loop(job, progress, checkpoints, workdir, guard)
        finally:
            checkpoints.close()
        return guard.requested


def loop(job: Job, progress: Progress, checkpoints: Checkpoints, workdir: Path, guard: PreemptionGuard) -> None:
    """Iterates until the end or a signal, then saves."""
    config = job.config
    if progress.iteration:
        print(f"resuming from iteration {progress.iteration}", flush=True)
    steps = make_steps(job)
    sampler = Sampler(job.pipeline, job.plan.times, config.evaluation.batch)
    history: list[Evaluation] = []
    if progress.iteration:
        history = load_evaluations(workdir, progress.iteration, job.rewards, len(job.evaluation_prompts))
    writer = MetricsWriter(workdir, progress.iteration or None, wandb=config.wandb)
    bar = tqdm.tqdm(total=config.num_iterations, initial=progress.iteration, desc=config.name, unit="it")
    if not history:
        writer.write(0, evaluate(job, sampler, progress, history, workdir))
    while progress.iteration < config.num_iterations and guard.requested is None:
        timer = PhaseTimer()
        try:
            with timer.phase("iteration"):
                progress, metrics = run_iteration(job, steps, progress, timer)
        except MissingScoreError:
            save(checkpoints, progress)
            raise
        last = progress.iteration == config.num_iterations
        if last or progress.iteration % config.evaluation.every == 0:
            with timer.phase("evaluation"):
                metrics |= evaluate(job, sampler, progress, history, workdir)
        writer.write(progress.iteration, metrics | speed_metrics(job, timer))
        show(bar, config, metrics)
        if metrics["skipped_in_a_row"] >= config.optim.max_skipped:
            raise NotFiniteError(
                f"iteration {progress.iteration}: {metrics['skipped_in_a_row']:.0f} updates in a row had a loss or "
                f"gradient that is not finite; the last good checkpoint is in {workdir / 'checkpoints'}"
            )
        if last or progress.iteration % config.checkpoint.every == 0:
            save(checkpoints, progress)
    bar.close()
    writer.close()
    save(checkpoints, progress)
    if guard.requested is None:
        report(job, history, workdir)


def kept_prompts(job: Job) -> list[str]:
    """The prompts of the pictures that an `Evaluation` keeps."""
    places = even_places(len(job.evaluation_prompts), job.config.evaluation.kept)
    return [job.evaluation_prompts[place] for place in places]


def before_after(job: Job, first: Evaluation, last: Evaluation) -> Image.Image:
    """Pictures of the first and the last evaluation: some evenly spread, and the largest gains where more are kept.

    The gains are those of the first held-out reward, or of the first trained one where none is held out.
    """
    prompts = kept_prompts(job)
    places = even_places(len(job.evaluation_prompts), job.config.evaluation.kept)
    judge = (job.config.rewards.heldout or job.config.rewards.train)[0]
    gains = (last.scores[judge] - first.scores[judge])[places]
    chosen = {f"{min(SHOWN, len(prompts))} of {len(places)} prompts, evenly spread": even_places(len(prompts), SHOWN)}
    if len(prompts) > SHOWN:
        chosen[f"the {SHOWN // 2} largest gains under {judge}"] = np.argsort(-gains)[: SHOWN // 2]
    return images.stack(
        [
            images.before_after(_floats(first)[rows], _floats(last)[rows], [prompts[i] for i in rows], title)
            for title, rows in chosen.items()
        ]
    )


def _floats(evaluation: Evaluation) -> np.ndarray:
    return evaluation.images.astype(np.float32) / 255


def speed_metrics(job: Job, timer: PhaseTimer) -> dict[str, float]:
    """Seconds by phase, images a second; peak device memory and model FLOP utilisation where they are known."""
    seconds = timer.take()
    prompts = job.config.prompts_per_iteration
    speed = {"images_per_second": prompts * job.plan.decodes / seconds["seconds/iteration"]}
    if (memory := peak_device_memory()) is not None:
        speed["peak_device_memory"] = memory
    peak, flops = peak_flops(jax.devices()[0].device_kind), job.pipeline.forward_flops
    if peak is not None and flops is not None:
        work = prompts * job.plan.forward_equivalents * flops
        busy = seconds["seconds/rollout"] + seconds["seconds/update"]
        speed["model_flop_utilisation"] = work / (busy * peak * jax.device_count())
    return seconds | speed


def show(bar: tqdm.tqdm, config: TrainConfig, metrics: dict[str, float]) -> None:
    """Moves the progress bar."""
    shown = {name: f"{metrics[f'reward/{name}/mean']:.4f}" for name in config.rewards.train}
    shown["|r-1|"] = f"{metrics['ratio/max_deviation']:.1e}"
    shown["clip"] = f"{metrics['clip/high'] + metrics['clip/low']:.0%}"
    bar.set_postfix(shown, refresh=False)
    bar.update()


def report(job: Job, history: Sequence[Evaluation], workdir: Path) -> None:
    """The run's last words: a table of what changed on the evaluation prompts, and the pictures."""
    config, first, last = job.config, history[0], history[-1]
    metrics = evaluation_metrics(first, last)
    print(f"\n{len(job.evaluation_prompts)} evaluation prompts, fixed noise, paired change with its 95 % interval:")
    for name in job.rewards:
        change, width = metrics[f"eval/{name}/change"], metrics[f"eval/{name}/change_ci95"]
        role = "trained" if name in config.rewards.train else "held out"
        print(
            f"  {name:18s} {role:9s} {mean_score(first.scores[name]):.4f} -> {mean_score(last.scores[name]):.4f}"
            f"   {change:+.4f} ± {width:.4f}"
        )
    plots.reward_curve(
        read_metrics(workdir / "metrics.jsonl"),
        config.rewards.train,
        config.rewards.heldout,
        workdir / "reward_curve.png",
    )
    plots.entropy_plot(
        job.plan.times,
        config.plan.noise_level,
        [branch.step for branch in job.plan.branches],
        [branch.merge for branch in job.plan.branches],
        config.plan.entropy_threshold,
        workdir / "entropy.png",
    )
    images.save_png(before_after(job, first, last), workdir / "before_after.png")
    print(f"pictures: {workdir}/before_after.png, reward_curve.png, entropy.png, eval/")


def main() -> None:
    config = from_config_dict(TrainConfig, cli.CONFIG.value)
    workdir = Path(WORKDIR.value or Path("runs") / config.name)
    try:
        signal_number = train(config, workdir, ALLOW_CONFIG_CHANGE.value)
    except (MissingScoreError, NotFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if signal_number is not None:
        print(f"saved in {workdir}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + signal_number)


if __name__ == "__main__":
    cli.run(main)
