"""A run's constants: all without a parameter in memory."""

from __future__ import annotations

import dataclasses

import jax
import optax
from jax.sharding import Mesh

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.data.prompts import read_prompts
from egrpo_jax.parallel import hosts
from egrpo_jax.pipelines import Pipeline, load_pipeline
from egrpo_jax.rewards import CheckedReward, load_reward
from egrpo_jax.rl.optimizer import make_optimizer
from egrpo_jax.rl.plan import Plan
from egrpo_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Job:
    """The constants of a run, but for the parameters that are not trained.

    Attributes:
      plan: of the first iteration; those of all have its shape.
    """

    config: TrainConfig
    plan: Plan
    pipeline: Pipeline
    rewards: dict[str, CheckedReward]
    prompts: list[str]
    evaluation_prompts: list[str]
    optimizer: optax.GradientTransformation

    def __post_init__(self) -> None:
        if self.config.learner.updates == "per_active_step" and not self.plan.updates_by_step:
            expected = f"'joint': the samples of {self.config.plan.algorithm} take several random steps each"
            raise ConfigError("learner.updates", "per_active_step", expected)

        self.plan.objective(self.config.learner)  # raises what does not go together

    def plan_at(self, iteration: int) -> Plan:
        """The plan of an iteration, counted from 0."""
        plan = self.config.plan.make_plan(iteration, self.config.seed)
        if not plan.shares_code(self.plan):
            expected = f"plans of one shape; that of iteration {iteration + 1} would have to be compiled anew"
            raise ConfigError("plan.algorithm", self.config.plan.algorithm, expected)
        return plan

    @property
    def rollouts(self) -> int:
        """Rollouts of an iteration: each prompt has one from each of its seeds."""
        return self.config.prompts_per_iteration * self.plan.seeds

    @property
    def rollouts_at_once(self) -> int:
        """Rollouts of one call of the compiled phase."""
        return (self.config.prompts_per_rollout or self.config.prompts_per_iteration) * self.plan.seeds


def make_job(config: TrainConfig, mesh: Mesh) -> Job:
    """Reads what `config` names, but for the model's weights.

    Raises:
      UserError: something is wrong with it, or does not go together.
    """
    plan = config.plan.make_plan(0, config.seed)
    prompts, evaluation_prompts = read_prompts(config.prompts), read_prompts(config.evaluation.prompts)
    pipeline = load_pipeline(config.model)
    pipeline.require([*prompts, *evaluation_prompts])
    size = image_size(pipeline)
    with hosts.alone(mesh) as own:
        names = config.rewards.train + config.rewards.heldout
        rewards = {name: load_reward(name, config.scorers, own) for name in names}
        for reward in rewards.values():
            reward.require([*prompts, *evaluation_prompts], size)
        by = config.rewards.diversity_by
        if by is not None and rewards[by].encode_images is None:
            able = [name for name, reward in rewards.items() if reward.encode_images is not None]
            expected = f"a reward that compares images; of this run these do: {', '.join(able) or 'none'}"
            raise ConfigError("rewards.diversity_by", by, expected)
    return Job(config, plan, pipeline, rewards, prompts, evaluation_prompts, make_optimizer(config.optim))


def image_size(pipeline: Pipeline) -> tuple[int, int]:
    """Height and width of the images, in pixels."""
    latents = jax.ShapeDtypeStruct((1, *pipeline.latents_shape), "float32")
    height, width, _ = jax.eval_shape(pipeline.decode, pipeline.abstract_params, latents).shape[1:]
    return height, width
