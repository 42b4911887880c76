"""A run from its start, or from where it was, to its end or a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import tqdm
from jax.sharding import Mesh

from egrpo_jax.common.config import to_config_dict
from egrpo_jax.common.lock import owned
from egrpo_jax.parallel import hosts
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.rewards import RewardError
from egrpo_jax.rl.plan import describe
from egrpo_jax.run.checkpoint import Checkpoints
from egrpo_jax.run.finishing import finishing
from egrpo_jax.run.metrics import MetricsWriter
from egrpo_jax.run.preemption import PreemptionGuard
from egrpo_jax.run.profile import Profiler, Window
from egrpo_jax.run.timing import PhaseTimer, count_compilations
from egrpo_jax.run.workdir import check_record, record_config
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.iteration import MissingScoreError, NotFiniteError, run_iteration
from egrpo_jax.training.job import Job, make_job
from egrpo_jax.training.numbers import speed_numbers
from egrpo_jax.training.phases import Phases, make_phases
from egrpo_jax.training.report import Evaluator, report, show, warn_of_rounding
from egrpo_jax.training.state import Progress, save, start_or_resume


def train(
    config: TrainConfig, workdir: Path, allow_config_change: bool = False, profile: Window | None = None
) -> int | None:
    """Runs or resumes training in `workdir`; returns the signal that ended it early, or None at its end.

    The iterations of `profile` are written to `<workdir>/tb`.

    A signal that comes before the first iteration, and a second Ctrl-C, end it at once (`PreemptionGuard`).

    Raises:
      UserError: something is wrong with the config, a file or the workdir, which another process may own.
      RewardError: a reward has failed.
      NotFiniteError: the policy has diverged.
      MissingScoreError: a score never came, and `rewards.on_missing` is "fail".
    """
    mesh = make_mesh(config.mesh)
    hosts.require_same(f"{to_config_dict(config).to_json()} {workdir.absolute()}", "config and workdir")
    with hosts.leader_speaks(), jax.set_mesh(mesh), PreemptionGuard() as guard:
        with hosts.agreed():
            job = make_job(config, mesh)
        with _claimed(workdir, config, allow_config_change):
            print(describe(job.plan, job.pipeline.passes), flush=True)
            with _opened(job, mesh, workdir, allow_config_change, profile) as run:
                run.evaluate_if_due()
                with guard.iterating():
                    run.iterate(guard)
            signal_number = guard.agree()
            if signal_number is None:
                with hosts.agreed():
                    if hosts.leads():
                        report(job, run.evaluate.history, workdir)
        return signal_number


@contextlib.contextmanager
def _claimed(workdir: Path, config: TrainConfig, allow_change: bool) -> Iterator[None]:
    """Ownership of `workdir`, whose record `config` does not contradict; the leader owns it for all."""
    with contextlib.ExitStack() as stack:
        with hosts.agreed():
            if hosts.leads():
                stack.enter_context(owned(workdir, "the workdir"))
                check_record(workdir, to_config_dict(config).to_dict(), allow_change)
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            # Beside the workdir: a restart, or a run like one before, compiles nothing anew. Of several hosts the first
            # one alone writes it, hence on the disk that they share.
            jax.config.update("jax_compilation_cache_dir", str(workdir.absolute().parent / ".compilation_cache"))
        yield


@contextlib.contextmanager
def _opened(job: Job, mesh: Mesh, workdir: Path, allow_change: bool, profile: Window | None) -> Iterator[Run]:
    """The run of the newest checkpoint, or a new one, with its files open."""
    checkpoints = Checkpoints(workdir / "checkpoints", job.config.checkpoint.keep)
    with finishing(checkpoints.close):
        phases = make_phases(job)  # before any weights are read: the work may not be dealt to these devices
        progress, frozen = start_or_resume(job, checkpoints, mesh, allow_change)
        if progress.iteration:
            print(f"resuming from iteration {progress.iteration}", flush=True)
        if profile is not None:
            profile.check(progress.iteration, job.config.num_iterations)
        with contextlib.ExitStack() as files:
            with hosts.agreed():
                evaluate, writer = Evaluator(job, frozen, workdir, progress.iteration), None
                if hosts.leads():
                    writer = MetricsWriter(workdir, progress.iteration or None, wandb=job.config.wandb)
                    files.enter_context(finishing(writer.close))
                    record_config(workdir, to_config_dict(job.config).to_dict())  # now that nothing refuses it any more
            profiler = Profiler(profile, workdir / "tb")
            files.enter_context(finishing(profiler.close))
            yield Run(job, phases, frozen, progress, checkpoints, evaluate, writer, profiler)


@dataclasses.dataclass
class Run:
    """A run under way: where it is, and what keeps and writes that.

    Attributes:
      frozen: the parameters that are not trained.
      writer: the leader's.
      sound: if `progress` is worth keeping. Parameters at which the loss is not finite are not: those before are.
    """

    job: Job
    phases: Phases
    frozen: Any
    progress: Progress
    checkpoints: Checkpoints
    evaluate: Evaluator
    writer: MetricsWriter | None
    profiler: Profiler
    sound: bool = True

    @property
    def ended(self) -> bool:
        """True once all iterations are done."""
        return self.progress.iteration >= self.job.config.num_iterations

    @property
    def due(self) -> bool:
        """True if the parameters are to be evaluated now, and have not been."""
        evaluated = self.evaluate.history and self.evaluate.history[-1].iteration == self.progress.iteration
        return not evaluated and (self.ended or self.progress.iteration % self.job.config.evaluation.every == 0)

    def evaluate_if_due(self) -> None:
        """Evaluates a new run's first parameters, or those at which a reward failed when it should have judged them."""
        if self.due:
            self.write(self.evaluate(self.progress))

    def iterate(self, guard: PreemptionGuard) -> None:
        """Iterates until the end or a signal, and saves; raises as `train`."""
        config, first = self.job.config, self.progress.iteration
        with tqdm.tqdm(total=config.num_iterations, initial=first, desc=config.name, unit="it") as bar:
            while guard.agree() is None and not self.ended:
                numbers = self.do_iteration()
                show(bar, config, numbers)
                if self.progress.iteration == first + 1:
                    warn_of_rounding(config, numbers)
                if numbers["skipped_in_a_row"] >= config.optim.max_skipped:
                    raise NotFiniteError(_skipped_line(self.progress.iteration, numbers, self.checkpoints))
                if self.progress.iteration % config.checkpoint.every == 0:
                    self.save()
        self.save()
        self.checkpoints.wait()

    def do_iteration(self) -> dict[str, float]:
        """One iteration, and an evaluation where it is due; saves what is there if a reward fails."""
        timer, plan = PhaseTimer(), self.job.plan_at(self.progress.iteration)
        try:
            with self.profiler.iteration(self.progress.iteration + 1), count_compilations() as compiled:
                with timer.phase("iteration"):
                    self.progress, numbers = run_iteration(self.job, self.phases, self.frozen, self.progress, timer)
                self.sound = not numbers["skipped_in_a_row"] or _no_scores(numbers)
                speed = lambda: speed_numbers(self.job, plan, timer, compiled)
                with finishing(lambda: self.write(numbers | speed())):
                    if self.due:
                        with timer.phase("evaluation"):
                            numbers |= self.evaluate(self.progress)
        except (MissingScoreError, RewardError):
            with finishing(self.save):
                raise
        return numbers

    def write(self, numbers: dict[str, float]) -> None:
        """Writes the numbers of the last iteration."""
        with hosts.agreed():
            if self.writer is not None:
                self.writer.write(self.progress.iteration, numbers)

    def save(self) -> None:
        """Starts writing a checkpoint, unless it is not worth it."""
        if self.sound:
            save(self.checkpoints, self.progress, self.job)


def _no_scores(numbers: dict[str, float]) -> bool:
    """Whether the last update was skipped because no group had all of its scores."""
    return numbers["groups_left_out"] == numbers["groups"]


def _skipped_line(iteration: int, numbers: dict[str, float], checkpoints: Checkpoints) -> str:
    why = "no group with all of its scores" if _no_scores(numbers) else "a loss or parameters that are not finite"
    return (
        f"iteration {iteration}: {numbers['skipped_in_a_row']:.0f} updates in a row had {why}; "
        f"the last good checkpoint is in {checkpoints.directory}"
    )
