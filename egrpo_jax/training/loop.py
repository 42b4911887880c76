"""A run from its start, or from where it was, to its end or a signal."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import jax
import tqdm
from jax.sharding import Mesh

from egrpo_jax.common.config import to_config_dict
from egrpo_jax.common.lock import owned
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.rl.plan import describe
from egrpo_jax.run.checkpoint import Checkpoints
from egrpo_jax.run.metrics import MetricsWriter
from egrpo_jax.run.preemption import PreemptionGuard
from egrpo_jax.run.timing import PhaseTimer
from egrpo_jax.run.workdir import claim_workdir
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.iteration import MissingScoreError, NotFiniteError, run_iteration
from egrpo_jax.training.job import Job, make_job, make_steps
from egrpo_jax.training.numbers import speed_numbers
from egrpo_jax.training.report import Evaluator, report, show, warn_of_rounding
from egrpo_jax.training.state import Progress, save, start_or_resume


def train(config: TrainConfig, workdir: Path, allow_config_change: bool = False) -> int | None:
    """Runs or resumes training in `workdir`; returns the signal that ended it early, or None at its end.

    Raises:
      UserError: something is wrong with the config, a file or the workdir, which another process may own.
      NotFiniteError: the policy has diverged.
      MissingScoreError: a score never came, and `rewards.on_missing` is "fail".
    """
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), PreemptionGuard() as guard:
        job = make_job(config, mesh)
        with owned(workdir, "the workdir"):
            claim_workdir(workdir, to_config_dict(config).to_dict(), allow_config_change)
            if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # a restarted run compiles nothing anew
                jax.config.update("jax_compilation_cache_dir", str(workdir.absolute() / "compilation_cache"))
            print(describe(job.plan), flush=True)
            with contextlib.closing(Checkpoints(workdir / "checkpoints", config.checkpoint.keep)) as checkpoints:
                _run(job, mesh, checkpoints, workdir, guard, allow_config_change)
        return guard.requested


def _run(
    job: Job, mesh: Mesh, checkpoints: Checkpoints, workdir: Path, guard: PreemptionGuard, allow_change: bool
) -> None:
    """Goes on from the newest checkpoint, and at the end reports."""
    progress, frozen = start_or_resume(job, checkpoints, mesh, allow_change)
    for damaged in checkpoints.damaged:
        print(f"warning: a damaged checkpoint was moved to {damaged}", file=sys.stderr)
    if progress.iteration:
        print(f"resuming from iteration {progress.iteration}", flush=True)
    evaluate = Evaluator(job, frozen, workdir, progress.iteration)
    with contextlib.closing(MetricsWriter(workdir, progress.iteration or None, wandb=job.config.wandb)) as writer:
        if not evaluate.history:
            writer.write(0, evaluate(progress))
        _iterate(job, frozen, progress, checkpoints, evaluate, writer, guard)
    if guard.requested is None:
        report(job, evaluate.history, workdir)


def _iterate(
    job: Job,
    frozen: Any,
    progress: Progress,
    checkpoints: Checkpoints,
    evaluate: Evaluator,
    writer: MetricsWriter,
    guard: PreemptionGuard,
) -> None:
    """Iterates until the end or a signal, and saves."""
    config, steps, first, sound = job.config, make_steps(job), progress.iteration, True
    with tqdm.tqdm(total=config.num_iterations, initial=first, desc=config.name, unit="it") as bar:
        while progress.iteration < config.num_iterations and guard.requested is None:
            timer = PhaseTimer()
            try:
                with timer.phase("iteration"):
                    progress, numbers = run_iteration(job, steps, frozen, progress, timer)
            except MissingScoreError:
                save(checkpoints, progress, job)
                raise
            last = progress.iteration == config.num_iterations
            if last or progress.iteration % config.evaluation.every == 0:
                with timer.phase("evaluation"):
                    numbers |= evaluate(progress)
            writer.write(progress.iteration, numbers | speed_numbers(job, timer))
            show(bar, config, numbers)
            if progress.iteration == first + 1:
                warn_of_rounding(config, numbers)
            if numbers["skipped_in_a_row"] >= config.optim.max_skipped:
                raise NotFiniteError(_skipped_line(progress.iteration, numbers, checkpoints))
            # Parameters at which the loss is not finite are not worth keeping: those before them are.
            sound = not numbers["skipped_in_a_row"] or _no_scores(numbers)
            if sound and progress.iteration % config.checkpoint.every == 0:
                save(checkpoints, progress, job)
    if sound:
        save(checkpoints, progress, job)


def _no_scores(numbers: dict[str, float]) -> bool:
    """Whether the last update was skipped because no group had all of its scores."""
    return numbers["groups_left_out"] == numbers["groups"]


def _skipped_line(iteration: int, numbers: dict[str, float], checkpoints: Checkpoints) -> str:
    why = "no group with all of its scores" if _no_scores(numbers) else "a loss or parameters that are not finite"
    return (
        f"iteration {iteration}: {numbers['skipped_in_a_row']:.0f} updates in a row had {why}; "
        f"the last good checkpoint is in {checkpoints.directory}"
    )
