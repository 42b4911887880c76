"""A run's constants and its compiled phases: all without a parameter in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import optax
from jax.sharding import Mesh

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.trees import combine
from egrpo_jax.data.prompts import read_prompts
from egrpo_jax.parallel.mesh import DATA, REPLICATED, over_data, spread
from egrpo_jax.pipelines import Pipeline, load_pipeline
from egrpo_jax.rewards import CheckedReward, load_reward
from egrpo_jax.rl.optimizer import make_optimizer
from egrpo_jax.rl.plan import Plan, make_plan
from egrpo_jax.rl.rollout import Rollout, Transitions, roll_out
from egrpo_jax.rl.update import TrainState, UpdateStats, update_policy
from egrpo_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """The constants of a run, but for the parameters that are not trained."""

    config: TrainConfig
    plan: Plan
    pipeline: Pipeline
    rewards: dict[str, CheckedReward]
    prompts: list[str]
    evaluation_prompts: list[str]
    optimizer: optax.GradientTransformation


class Phases(NamedTuple):
    """The phases of an iteration, compiled at their first call."""

    rollout: Callable[[Any, Any, chex.Array], Rollout]
    decode: Callable[[Any, chex.Array], chex.Array]
    update: Callable[..., tuple[TrainState, UpdateStats]]


def make_job(config: TrainConfig, mesh: Mesh) -> Job:
    """Reads what `config` names, but for the model's weights.

    Raises:
      UserError: something is wrong with it, or does not go together.
    """
    check_devices(config, mesh.shape[DATA])
    plan = make_plan(config.plan)
    prompts, evaluation_prompts = read_prompts(config.prompts), read_prompts(config.evaluation.prompts)
    pipeline = load_pipeline(config.model)
    pipeline.require([*prompts, *evaluation_prompts])
    rewards = {name: load_reward(name, config.scorers, mesh) for name in config.rewards.train + config.rewards.heldout}
    for reward in rewards.values():
        reward.require([*prompts, *evaluation_prompts], image_size(pipeline))
    return Job(config, plan, pipeline, rewards, prompts, evaluation_prompts, make_optimizer(config.optim))


def check_devices(config: TrainConfig, devices: int) -> None:
    """Raises ConfigError if prompts or micro-batches cannot be spread evenly over `devices`."""
    key = "prompts_per_iteration" if config.prompts_per_rollout is None else "prompts_per_rollout"
    if getattr(config, key) % devices:
        expected = f"a multiple of the {devices} devices on the mesh axis {DATA}"
        raise ConfigError(key, getattr(config, key), expected)
    on_each, micro_batch = config.prompts_per_iteration // devices, config.learner.micro_batch
    if micro_batch is not None and on_each % micro_batch:
        raise ConfigError("learner.micro_batch", micro_batch, f"a divisor of the {on_each} prompts on each device")


def image_size(pipeline: Pipeline) -> tuple[int, int]:
    """Height and width of the images, in pixels."""
    latents = jax.ShapeDtypeStruct((1, *pipeline.latents_shape), "float32")
    height, width, _ = jax.eval_shape(pipeline.decode, pipeline.abstract_params, latents).shape[1:]
    return height, width


def make_phases(job: Job) -> Phases:
    """The phases for the mesh that is set: prompts spread over `data`, parameters as they are."""
    pipeline, prompts = job.pipeline, over_data()
    rollout = spread(
        lambda params, conditioning, keys: roll_out(
            pipeline.velocity, params, job.plan, conditioning, keys, pipeline.latents_shape
        ),
        (REPLICATED, prompts, prompts),
        prompts,
    )
    decode = spread(pipeline.decode, (REPLICATED, prompts), prompts)

    def step(
        state: TrainState, frozen: Any, transitions: Transitions, advantage: chex.Array, conditioning: Any
    ) -> tuple[TrainState, UpdateStats]:
        velocity = lambda trained, *inputs: pipeline.velocity(combine(trained, frozen), *inputs)
        return update_policy(
            velocity, job.optimizer, job.config.learner, state, transitions, advantage, conditioning, axis_name=DATA
        )

    in_specs = (REPLICATED, REPLICATED, prompts, prompts, prompts)
    return Phases(rollout, decode, spread(step, in_specs, (REPLICATED, REPLICATED), donate=(0,)))
