"""Flags of programs that sample: which prompts, from which noise, in which steps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from absl import flags

from egrpo_jax.common.errors import UserError
from egrpo_jax.data.prompts import read_prompts
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.flow.grid import Times, shifted_times
from egrpo_jax.flow.solver import SOLVERS
from egrpo_jax.pipelines import Pipeline
from egrpo_jax.training.config import TrainConfig

LAST_SEED = 2**32 - 1
"""JAX's keys are of 32 bits: greater seeds would be others again."""


class Sampling(NamedTuple):
    """A way to sample images: `batch` prompts at once, from time to time of `times` by `solver`."""

    batch: int
    times: Times
    solver: str

    def sampler(self, pipeline: Pipeline) -> Sampler:
        """The sampler that does so, under the mesh that is set."""
        return Sampler(pipeline, self.times, self.batch, self.solver)

    def record(self) -> dict[str, Any]:
        """The steps, their times and the solver, as JSON values."""
        return {"steps": len(self.times) - 1, "times": list(self.times), "solver": self.solver}


class SamplingFlags:
    """The flags --prompt, --prompt_file, --seed, --steps, --grid, --solver and --batch."""

    def __init__(self, values: flags.FlagValues):
        self._prompt = flags.DEFINE_multi_string("prompt", None, "A prompt", flag_values=values)
        self._file = flags.DEFINE_string(
            "prompt_file",
            None,
            "Prompts from a file (txt, JSON, JSONL, CSV or TSV) or a built-in set.",
            flag_values=values,
        )
        self._seed = flags.DEFINE_integer(
            "seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=LAST_SEED, flag_values=values
        )
        self._steps = flags.DEFINE_integer(
            "steps",
            None,
            "Steps of the flow; by default those of the plan.",
            lower_bound=1,
            upper_bound=10_000,  # as of a plan
            flag_values=values,
        )
        self._grid = flags.DEFINE_enum(
            "grid",
            "training",
            ["training", "pipeline"],
            "Time grid: of the plan, or of the published pipeline, shifted by the image's size.",
            flag_values=values,
        )
        self._solver = flags.DEFINE_enum(
            "solver",
            None,
            list(SOLVERS),
            "Euler's steps, or DPM-Solver++(2M)'s, of second order; by default as in evaluations.",
            flag_values=values,
        )
        self._batch = flags.DEFINE_integer(
            "batch",
            None,
            "Most prompts sampled at once; by default as in evaluations.",
            lower_bound=1,
            flag_values=values,
        )

    @property
    def seed(self) -> int:
        """The seed of the noise, of 32 bits."""
        return self._seed.value

    @property
    def grid(self) -> str:
        """The name of the time grid."""
        return self._grid.value

    def prompts(self, default: str | None = None) -> tuple[str, list[str]]:
        """The source of the prompts, and the prompts; of the file or built-in set `default` if the flags name none.

        Raises:
          UserError: both flags are given, or neither and there is no default, or what they name has no prompt.
        """
        given = self._prompt.value
        if given and self._file.value is not None:
            raise UserError("expected --prompt, once for each prompt, or --prompt_file, found both")
        if given:
            return "--prompt", [_checked(prompt) for prompt in given]
        source = self._file.value or default
        if source is None:
            raise UserError("expected --prompt, once for each prompt, or --prompt_file")
        return source, read_prompts(source)

    def sampling(self, config: TrainConfig, pipeline: Pipeline, num_prompts: int) -> Sampling:
        """The sampling that the flags name. Raises UserError if they ask for the model's own grid and it has none."""
        most = self._batch.value or config.evaluation.batch
        batch = math.ceil(num_prompts / math.ceil(num_prompts / most))  # as even as can be: little is filled up
        steps, solver = self._steps.value or config.plan.num_steps, self._solver.value or config.evaluation.solver
        return Sampling(batch, self._times(config, pipeline, steps), solver)

    def _times(self, config: TrainConfig, pipeline: Pipeline, steps: int) -> Times:
        if self.grid == "training":
            return shifted_times(steps, config.plan.shift)
        if pipeline.sampling_times is None:
            raise UserError(f"--grid=pipeline: the model {config.model.name!r} has no grid of its own; use training")
        return pipeline.sampling_times(steps)


def _checked(prompt: str) -> str:
    if not prompt.strip():
        raise UserError(f"--prompt: found {prompt!r}, expected a text")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"--prompt: found {prompt!r}, expected UTF-8") from None
    return prompt.strip()
