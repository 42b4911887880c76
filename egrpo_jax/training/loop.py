"""A run from its start, or from where it was, to its end or a signal."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax
import tqdm

from egrpo_jax.common.config import to_config_dict
from egrpo_jax.evaluation.history import (
    Evaluation,
    load_evaluations,
)
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.parallel.rules import lay_out
from egrpo_jax.rl.plan import describe
from egrpo_jax.run.checkpoint import Checkpoints
from egrpo_jax.run.metrics import MetricsWriter
from egrpo_jax.run.preemption import PreemptionGuard
from egrpo_jax.run.timing import PhaseTimer
from egrpo_jax.run.workdir import claim_workdir
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.iteration import MissingScoreError, run_iteration
from egrpo_jax.training.job import Job, make_job, make_steps
from egrpo_jax.training.report import evaluate, report, show, speed_metrics
from egrpo_jax.training.state import Progress, first_progress, restore, save


class NotFiniteError(RuntimeError):
    """Too many updates in a row were skipped because loss or gradient was not finite."""


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
