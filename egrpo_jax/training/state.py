"""What changes during a run, and how it is kept in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import optax
from jax.sharding import Mesh

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.trees import combine, partition
from egrpo_jax.pipelines import Pipeline
from egrpo_jax.rl.update import TrainState, init_state
from egrpo_jax.run.checkpoint import Checkpoints
from egrpo_jax.training.config import TrainConfig


class Progress(NamedTuple):
    """Where a run is: `iteration` iterations completed, `position` prompts used, and the key of all its noise."""

    state: TrainState
    key: chex.PRNGKey
    iteration: int
    position: int


def first_progress(trained: Any, optimizer: optax.GradientTransformation, config: TrainConfig) -> Progress:
    """Where a run that trains the parameters `trained` starts."""
    state = init_state(trained, optimizer, config.learner)
    return Progress(state, jax.random.key(config.seed), iteration=0, position=0)


def policy_params(state: TrainState) -> Any:
    """The parameters to judge a run by: their moving average where one is kept."""
    return state.params if state.ema is None else state.ema


def save(checkpoints: Checkpoints, progress: Progress) -> None:
    """Starts writing a checkpoint."""
    tree = {"state": progress.state, "key": jax.random.key_data(progress.key)}
    checkpoints.save(progress.iteration, tree, {"position": progress.position})


def restore(checkpoints: Checkpoints, start: Progress) -> Progress:
    """The newest checkpoint's progress, or `start` if there is none."""
    template = {"state": start.state, "key": jax.random.key_data(start.key)}
    restored = checkpoints.restore_latest(template)
    if restored is None:
        return start
    iteration, tree, meta = restored
    return Progress(tree["state"], jax.random.wrap_key_data(tree["key"]), iteration, meta["position"])


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
    checkpoints = Checkpoints(directory, keep=config.checkpoint.keep)
    try:
        # Without the optimizer's moments, which may be twice as large as all that is asked for.
        restored = checkpoints.restore_latest({"state": {kept: trained}}, partial=True)
    finally:
        checkpoints.close()
    if restored is None:
        raise UserError(f"found no checkpoint in {directory}; the run has not saved one yet")
    iteration, tree, _ = restored
    return tree["state"][kept], iteration
