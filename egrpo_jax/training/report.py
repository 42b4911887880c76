"""What people see of a run: evaluations, the progress bar, the last table and pictures."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import tqdm
from PIL import Image

from egrpo_jax.common.trees import combine
from egrpo_jax.evaluation.history import (
    Evaluation,
    evaluation_metrics,
    even_places,
    make_evaluation,
    mean_score,
    parted_rewards,
    save_evaluation,
)
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.figures import grids as images
from egrpo_jax.figures import plots
from egrpo_jax.run.metrics import read_metrics
from egrpo_jax.run.timing import PhaseTimer, peak_device_memory, peak_flops
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import Job
from egrpo_jax.training.state import Progress, policy_params

SHOWN = 16
"""Pictures on a grid."""


EVALUATION_SEED = 2**31 - 1
"""Folded into the seed for the fixed noise of evaluations; no iteration has this number."""


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
    images.save_image(sheet, workdir / "eval" / f"{progress.iteration:06d}.png")
    for line in parted_rewards(history, job.config.rewards.train, job.config.rewards.heldout):
        tqdm.tqdm.write(f"warning: iteration {progress.iteration}: {line}", file=sys.stderr)
    return evaluation_metrics(history[0], history[-1])


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
    images.save_image(before_after(job, first, last), workdir / "before_after.png")
    print(f"pictures: {workdir}/before_after.png, reward_curve.png, entropy.png, eval/")
