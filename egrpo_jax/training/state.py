"""The state of a run, and its way into checkpoints and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
from jax.sharding import Mesh, NamedSharding

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.offload import on_host
from egrpo_jax.common.trees import combine, partition
from egrpo_jax.data.prompts import prompts_hash
from egrpo_jax.parallel import hosts
from egrpo_jax.parallel.mesh import REPLICATED
from egrpo_jax.parallel.rules import with_shardings
from egrpo_jax.pipelines import Pipeline
from egrpo_jax.rl.adaptive import Memory
from egrpo_jax.rl.update import TrainState, init_state
from egrpo_jax.run.checkpoint import Checkpoints
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import Job


class Running(NamedTuple):
    """Mean and variance of rewards over iterations."""

    mean: float
    variance: float


class Progress(NamedTuple):
    """The point that a run has reached: iterations completed, prompts used, and the key of all its noise.

    `running` is of the weighted sum of the training rewards; None before the first iteration, and where no plan asks.
    `memory` is that of a plan whose noise adapts; None as well.
    """

    state: TrainState
    key: chex.PRNGKey
    iteration: int
    position: int
    running: Running | None = None
    memory: Memory | None = None


def abstract_state(job: Job, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state: moments and averages lie as their parameters do, or in the hosts' memory."""
    trained, _ = partition(job.pipeline.abstract(mesh), job.pipeline.trainable)
    shapes = jax.eval_shape(lambda params: init_state(params, job.optimizer, job.config.learner), trained)
    state = with_shardings(mesh, job.pipeline.rules, shapes)
    return state._replace(opt_state=on_host(state.opt_state)) if job.config.optim.offload else state


def start_or_resume(job: Job, checkpoints: Checkpoints, mesh: Mesh, allow_change: bool = False) -> tuple[Progress, Any]:
    """The newest checkpoint's progress, or the first of a run, and the parameters that are not trained.

    A checkpoint is restored into shapes, before any weights are read: nothing is ever held twice.

    Raises:
      UserError: a checkpoint is of another model, or, unless `allow_change`, of other prompts under the same name.
    """
    state = abstract_state(job, mesh)
    key_data = hosts.on_all(jax.random.key_data(jax.random.key(job.config.seed)), NamedSharding(mesh, REPLICATED))
    restored = checkpoints.restore_latest({"state": state, "key": key_data})
    if restored is None:
        trained, frozen = partition(job.pipeline.load(mesh), job.pipeline.trainable)
        key = jax.random.wrap_key_data(key_data)
        return Progress(_first_state(job, trained, state), key, iteration=0, position=0), frozen
    iteration, tree, meta = restored
    if meta["prompts"] != prompts_hash(job.prompts) and not allow_change:
        raise UserError(
            f"the prompts {job.config.prompts!r} are not those that the run was saved with; put them back, pass "
            "--allow_config_change to go on with the new ones, or choose another workdir"
        )
    key = jax.random.wrap_key_data(tree["key"])
    running = Running(*meta["running"]) if meta.get("running") else None
    memory = Memory.read(meta["memory"]) if meta.get("memory") else None
    return Progress(tree["state"], key, iteration, meta["position"], running, memory), job.pipeline.load_frozen(mesh)


def _first_state(job: Job, trained: Any, abstract: TrainState) -> TrainState:
    """The state before the first update, whose parameters are `trained` themselves."""
    rest = lambda params: init_state(params, job.optimizer, job.config.learner)._replace(params=None)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract._replace(params=None))
    return jax.jit(rest, out_shardings=shardings)(trained)._replace(params=trained)


def policy_params(state: TrainState) -> Any:
    """The parameters to judge a run by: their moving average where one is kept."""
    return state.params if state.ema is None else state.ema


def save(checkpoints: Checkpoints, progress: Progress, job: Job) -> None:
    """Starts writing a checkpoint."""
    tree = {"state": progress.state, "key": jax.random.key_data(progress.key)}
    kept = {"running": progress.running, "memory": progress.memory}
    meta = {"position": progress.position, "prompts": prompts_hash(job.prompts), **kept}
    checkpoints.save(progress.iteration, tree, meta)


def restore_params(workdir: Path, pipeline: Pipeline, config: TrainConfig, mesh: Mesh) -> tuple[Any, int]:
    """All parameters of `pipeline`, those that the run in `workdir` trained being the run's, and its iteration.

    Raises:
      UserError: there is no checkpoint, or it is of another model or config.
    """
    trained, iteration = restore_trained(workdir, pipeline, config, mesh)
    return combine(trained, pipeline.load_frozen(mesh)), iteration


def restore_trained(workdir: Path, pipeline: Pipeline, config: TrainConfig, mesh: Mesh) -> tuple[Any, int]:
    """The parameters that the run in `workdir` trained, None in place of the others, and its iteration.

    Raises:
      UserError: there is no checkpoint, or it is of another model or config.
    """
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        raise UserError(f"found no checkpoints in {workdir}, expected the workdir of a training run")
    trained, _ = partition(pipeline.abstract(mesh), pipeline.trainable)
    kept = "params" if config.learner.ema_decay is None else "ema"
    checkpoints = Checkpoints(directory, read_only=True)
    try:
        # Without the optimizer's moments, which may be twice as large as all that is asked for.
        restored = checkpoints.restore_latest({"state": {kept: trained}}, partial=True)
    finally:
        checkpoints.close()
    if restored is None:
        raise UserError(f"found no checkpoint in {directory}; the run has not saved one yet")
    iteration, tree, _ = restored
    return tree["state"][kept], iteration
