"""The flags that `sample` and `evaluate` have in common: whose images, and how they are sampled."""

from __future__ import annotations

from typing import NamedTuple

from absl import flags

from egrpo_jax.common.errors import UserError
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.pipelines import Pipeline
from egrpo_jax.training.config import TrainConfig

WORKDIR = flags.DEFINE_string("workdir", None, "The training run whose weights are taken.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)
STEPS = flags.DEFINE_integer("steps", None, "Steps of the flow; by default those of the plan.", lower_bound=1)
SCHEDULE = flags.DEFINE_enum(
    "schedule",
    "training",
    ["training", "pipeline"],
    "Time grid: of the plan, or of the published pipeline, shifted by the image's size.",
)
BATCH = flags.DEFINE_integer("batch", None, "Prompts sampled at once; by default as in evaluations.", lower_bound=1)


class Sampling(NamedTuple):
    """How images are sampled: `batch` prompts at once, in `steps` on a time grid with `shift`."""

    batch: int
    steps: int
    shift: float

    def sampler(self, pipeline: Pipeline) -> Sampler:
        """What does it, under the mesh that is set."""
        return Sampler(pipeline, shifted_times(self.steps, self.shift), self.batch)


def chosen_sampling(config: TrainConfig, pipeline: Pipeline, num_prompts: int) -> Sampling:
    """What the flags name. Raises UserError if the model has no schedule of its own and --schedule asks for it."""
    batch = BATCH.value or min(config.evaluation.batch, num_prompts)
    return Sampling(batch, STEPS.value or config.plan.num_steps, _shift(config, pipeline))


def _shift(config: TrainConfig, pipeline: Pipeline) -> float:
    if SCHEDULE.value == "training":
        return config.plan.shift
    if pipeline.sampling_shift is None:
        raise UserError(
            f"--schedule=pipeline: the model {config.model.name!r} has no schedule of its own; use training"
        )
    return pipeline.sampling_shift
