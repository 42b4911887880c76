"""A run as people see it: evaluations, the progress bar, the last table and images."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm
from PIL import Image

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.trees import combine
from egrpo_jax.data.prompts import prompts_hash
from egrpo_jax.evaluation.history import (
    Evaluation,
    evaluate,
    evaluation_numbers,
    even_indices,
    load_evaluations,
    parted_rewards,
    save_evaluation,
)
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.figures import grids, plots
from egrpo_jax.parallel import hosts
from egrpo_jax.rewards.base import LARGEST
from egrpo_jax.rl.adaptive import AdaptivePlan
from egrpo_jax.run.metrics import read_metrics
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import Job
from egrpo_jax.training.state import Progress, policy_params

SHOWN = 16
"""Images on a grid."""
EVALUATION_SEED = 2**31 - 1
"""Folded into the seed for the fixed noise of evaluations; no iteration has this number."""


class Evaluator:
    """Evaluates a run's parameters, their average where one is kept, on fixed prompts and noise.

    Attributes:
      history: the evaluations so far.
    """

    def __init__(self, job: Job, frozen: Any, workdir: Path, iteration: int):
        """`frozen`: the parameters that are not trained; `iteration`: where the run is, whose evaluations are read.

        Raises:
          UserError: one of them is missing, damaged, or of other prompts or rewards.
        """
        self._job, self._frozen, self._workdir = job, frozen, workdir
        batch = min(job.config.evaluation.batch, len(job.evaluation_prompts))
        self._sampler = Sampler(job.pipeline, job.plan.times, batch, job.config.evaluation.solver)
        self._prompts = prompts_hash(job.evaluation_prompts)
        self.history = load_evaluations(workdir, iteration, job.rewards, self._prompts) if iteration else []

    def __call__(self, progress: Progress) -> dict[str, float]:
        """Adds an evaluation to `history`, writes its scores and a grid of images, and returns its numbers.

        Raises:
          UserError: it is the first, and a reward scored none of its images.
        """
        job, key = self._job, jax.random.fold_in(jax.random.key(self._job.config.seed), EVALUATION_SEED)
        params = combine(policy_params(progress.state), self._frozen)
        prompts, kept = job.evaluation_prompts, job.config.evaluation.kept
        now = evaluate(progress.iteration, self._sampler, params, prompts, key, job.rewards, kept)
        if not self.history:
            _check_scored(now)
        self.history.append(now)
        with hosts.agreed():
            if hosts.leads():
                self._keep(now)
        for line in parted_rewards(self.history, job.config.rewards.train, job.config.rewards.heldout):
            _warn(f"iteration {progress.iteration}: {line}")
        return evaluation_numbers(self.history[0], now)

    def _keep(self, now: Evaluation) -> None:
        """Writes scores and a grid of images."""
        save_evaluation(self._workdir, now, self._prompts)
        captions = kept_prompts(self._job)
        shown = even_indices(len(captions), SHOWN)
        sheet = grids.grid(now.images[shown], math.ceil(math.sqrt(len(shown))), [captions[i] for i in shown])
        grids.save_image(sheet, self._workdir / "eval" / f"{now.iteration:06d}.png")


def _check_scored(first: Evaluation) -> None:
    """Raises UserError if a reward gave the `first` evaluation nothing that later ones could be compared with."""
    for name, scores in first.scores.items():
        if not scores.came.any():
            raise UserError(
                f"the reward {name!r} scored none of the {len(scores.came)} evaluation images before the first "
                f"iteration, expected finite numbers within plus and minus {LARGEST:g}; if it is on another machine, "
                "see that its server answers"
            )


def warn_of_rounding(config: TrainConfig, numbers: dict[str, float]) -> None:
    """Says if rollout and update compute log-densities that differ by more than the clip range."""
    found, clip_range = numbers["ratio/rollout_deviation"], config.learner.clip_range
    if config.learner.objective == "clip" and found > clip_range:
        _warn(
            f"rollout and update round differently: |r - 1| up to {found:.1e} at the same parameters, against a "
            f"clip_range of {clip_range:.1e}; the ratio is taken from the update's own passes and is not affected, but "
            "samples are not quite from the policy that is trained: consider dtype float32"
        )


def _warn(line: str) -> None:
    tqdm.tqdm.write(f"warning: {line}", file=sys.stderr)


def kept_prompts(job: Job) -> list[str]:
    """The prompts of the images that an `Evaluation` keeps."""
    indices = even_indices(len(job.evaluation_prompts), job.config.evaluation.kept)
    return [job.evaluation_prompts[index] for index in indices]


def before_after(job: Job, first: Evaluation, last: Evaluation) -> Image.Image:
    """Images of the first and the last evaluation: some evenly spread, and the largest gains where more are kept.

    The gains are those of the first held-out reward, or of the first training reward where none is held out.
    """
    prompts = kept_prompts(job)
    indices = even_indices(len(job.evaluation_prompts), job.config.evaluation.kept)
    judge = (job.config.rewards.heldout or job.config.rewards.train)[0]
    gains = (last.scores[judge].with_nan() - first.scores[judge].with_nan())[indices]
    chosen = {f"{min(SHOWN, len(prompts))} of {len(indices)} prompts, evenly spread": even_indices(len(prompts), SHOWN)}
    if len(prompts) > SHOWN:
        chosen[f"the {SHOWN // 2} largest gains under {judge}"] = np.argsort(-gains)[: SHOWN // 2]
    return grids.stack(
        [
            grids.before_after(first.images[rows], last.images[rows], [prompts[i] for i in rows], title)
            for title, rows in chosen.items()
        ]
    )


def show(bar: tqdm.tqdm, config: TrainConfig, numbers: dict[str, float]) -> None:
    """Moves the progress bar."""
    shown = {name: f"{numbers[f'reward/{name}/mean']:.4f}" for name in config.rewards.train}
    shown["|r-1|"] = f"{numbers['ratio/max_deviation']:.1e}"
    shown["clip"] = f"{numbers['clip/high'] + numbers['clip/low']:.0%}"
    bar.set_postfix(shown, refresh=False)
    bar.update()


def report(job: Job, history: Sequence[Evaluation], workdir: Path) -> None:
    """Prints a table of what changed on the evaluation prompts, and draws the figures."""
    config, first, last = job.config, history[0], history[-1]
    numbers = evaluation_numbers(first, last)
    print(
        f"\n{len(job.evaluation_prompts)} evaluation prompts, fixed noise, iteration {first.iteration} -> "
        f"{last.iteration}, paired change with its 95 % interval:"
    )
    for name in job.rewards:
        change, width = numbers[f"eval/{name}/change"], numbers[f"eval/{name}/change_ci95"]
        role = "train" if name in config.rewards.train else "held out"
        print(
            f"  {name:18s} {role:8s} {first.scores[name].mean():.4f} -> {last.scores[name].mean():.4f}"
            f"   {change:+.4f} ± {width:.4f}"
        )
    metrics = read_metrics(workdir / "metrics.jsonl")
    plots.reward_curve(metrics, config.rewards.train, config.rewards.heldout, workdir / "reward_curve.png")
    images = ["before_after.png", "reward_curve.png"]
    if isinstance(job.plan, AdaptivePlan):
        plots.noise_plot(metrics, job.plan.groups, workdir / "noise.png")
        images.append("noise.png")
    if job.plan.branches:
        plots.entropy_plot(
            job.plan.times,
            job.plan.process,
            [branch.step for branch in job.plan.branches],
            [branch.merge for branch in job.plan.branches],
            getattr(config.plan, "entropy_threshold", None),
            workdir / "entropy.png",
        )
        images.append("entropy.png")
    grids.save_image(before_after(job, first, last), workdir / "before_after.png")
    print(f"images: {workdir}/{', '.join(images)}, eval/")
