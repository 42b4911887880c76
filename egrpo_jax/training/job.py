"""What stays the same during a run, and its compiled phases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import optax
from jax.sharding import Mesh

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.trees import combine, partition
from egrpo_jax.data.prompts import read_prompts
from egrpo_jax.parallel.mesh import DATA, REPLICATED, over_data, spread
from egrpo_jax.pipelines import Pipeline, load_pipeline
from egrpo_jax.rewards import CheckedReward, load_reward
from egrpo_jax.rl.optimizer import make_optimizer
from egrpo_jax.rl.plan import Plan, make_plan
from egrpo_jax.rl.rollout import Rollout, Transitions, roll_out
from egrpo_jax.rl.update import TrainState, UpdateStats, update
from egrpo_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """All that stays the same during a run; `frozen` are the parameters that are not trained."""

    config: TrainConfig
    plan: Plan
    pipeline: Pipeline
    rewards: dict[str, CheckedReward]
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
    pipeline = load_pipeline(config.model)
    pipeline.require([*prompts, *evaluation_prompts])
    trained, frozen = partition(pipeline.load(mesh), pipeline.trainable)
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
