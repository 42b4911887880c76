"""Measures what random steps are good for, for a model and its rewards, and recommends a schedule.

    python -m egrpo_jax.analyze --config configs/emoji.py --out analysis
    python -m egrpo_jax.analyze --workdir runs/emoji --out analysis      # at the weights of a run

Each step of the grid is made random by itself, as it is and merged to the entropy of the config, by the config's kernel
and by the exact one. --out becomes a folder: `analysis.md`, `analysis.json` and `analysis.png`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import tqdm
from absl import flags

from egrpo_jax import cli
from egrpo_jax.analysis.probe import Form, forms
from egrpo_jax.analysis.recommend import recommend
from egrpo_jax.analysis.report import as_json, draw, page
from egrpo_jax.analysis.study import FormStudy, Sizes, count_work, study_form
from egrpo_jax.cli.model import ModelFlags
from egrpo_jax.common.atomic import atomic_write, check_new_folder, new_folder
from egrpo_jax.common.config import to_config_dict
from egrpo_jax.common.errors import UserError
from egrpo_jax.data.prompts import prompts_at
from egrpo_jax.evaluation import protocol
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.pipelines import Pipeline
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import make_job
from egrpo_jax.training.state import restore_params

FLAGS = flags.FlagValues()
MODEL = ModelFlags(FLAGS)
OUT = flags.DEFINE_string("out", None, "New folder to write.", required=True, flag_values=FLAGS)
PROMPTS = flags.DEFINE_integer("prompts", 8, "Prompts, the first of the training.", lower_bound=1, flag_values=FLAGS)
PAIRS = flags.DEFINE_integer(
    "pairs", None, "Pairs of samples in a group; by default the group size.", lower_bound=2, flag_values=FLAGS
)
REPLICATES = flags.DEFINE_integer(
    "replicates", 10, "Rollouts, each with noise of its own.", lower_bound=3, flag_values=FLAGS
)
TAILS = flags.DEFINE_integer(
    "tail_replicates", 2, "Of these, how many try other tails.", lower_bound=1, flag_values=FLAGS
)
STEPS = flags.DEFINE_list(
    "steps", None, "Grid steps, separated by commas; by default all but the last.", flag_values=FLAGS
)
BATCH = flags.DEFINE_integer(
    "batch",
    None,
    "Prompts rolled out at once, a divisor of --prompts; by default all.",
    lower_bound=1,
    flag_values=FLAGS,
)


def chosen_steps() -> tuple[int, ...] | None:
    """The steps of --steps."""
    if STEPS.value is None:
        return None
    try:
        return tuple(map(int, STEPS.value))
    except ValueError:
        raise UserError(
            f"--steps: found {','.join(STEPS.value)}, expected whole numbers, separated by commas"
        ) from None


def probing(config: TrainConfig) -> TrainConfig:
    """The run's config with the sizes of the analysis, a plain objective, and an update for each step."""
    if PROMPTS.value % (BATCH.value or PROMPTS.value):
        raise UserError(f"--batch: found {BATCH.value}, expected a divisor of --prompts, {PROMPTS.value}")
    if TAILS.value > REPLICATES.value:
        raise UserError(f"--tail_replicates: found {TAILS.value}, expected at most --replicates, {REPLICATES.value}")
    kept = {
        name: getattr(config.learner, name) for name in ("step_weights", "micro_batch", "advantage_clip", "ema_decay")
    }
    return dataclasses.replace(
        config,
        prompts_per_iteration=PROMPTS.value,
        prompts_per_rollout=BATCH.value,
        learner=LearnerConfig(updates="per_active_step", **kept),
        rewards=dataclasses.replace(config.rewards, diversity=0.0, diversity_by=None),
    )


class Measured(NamedTuple):
    """The studies of all kernels, of which weights of which model, and the prompts."""

    studies: list[FormStudy]
    pipeline: Pipeline
    weights: str
    prompts: list[str]


def measure(given: TrainConfig, config: TrainConfig, kernels: Sequence[Form], sizes: Sizes) -> Measured:
    """Measures `kernels` by `config`, at the weights of the base model or of the run of `given`."""
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        job = make_job(config, mesh)
        prompts = prompts_at(job.prompts, config.seed, 0, config.prompts_per_iteration)
        params, stale, weights = job.pipeline.load(mesh), None, "of the base model"
        if MODEL.workdir is not None:
            stale = params
            params, iteration = restore_params(MODEL.workdir, job.pipeline, given, mesh)
            weights = f"of the run {MODEL.workdir.name}, iteration {iteration}"
        with tqdm.tqdm(total=sum(count_work(form, sizes) for form in kernels), desc="analysis") as bar:
            studies = [study_form(job, form, params, stale, prompts, sizes, bar.update) for form in kernels]
    return Measured(studies, job.pipeline, weights, prompts)


def main() -> None:
    """Measures, recommends and writes."""
    given, out = MODEL.config(), Path(OUT.value)
    config, sizes = probing(given), Sizes(REPLICATES.value, TAILS.value)
    pairs = PAIRS.value or config.plan.group_size
    kernels = forms(config.plan, pairs, chosen_steps())
    check_new_folder(out)
    studies, pipeline, weights, prompts = measure(given, config, kernels, sizes)
    train, heldout = config.rewards.train, config.rewards.heldout
    advice = recommend(studies, train, heldout)
    about = (
        f"{config.model.name}, weights {weights}; {len(prompts)} prompts, {pairs} pairs of opposite noise in a group, "
        f"{sizes.replicates} rollouts, {sizes.tail_replicates} of them with other tails; trained reward "
        f"{', '.join(train)}; held out {', '.join(heldout) or 'none'}."
    )
    made = {
        "model": protocol.describe_model(config.model, pipeline),
        "weights": weights,
        "prompts": protocol.describe_prompts(config.prompts, prompts),
        "sizes": {"prompts": len(prompts), "pairs": pairs, **sizes._asdict()},
        "versions": protocol.environment(),
        "config": protocol.public_config(to_config_dict(config).to_dict()),
    }
    record = {"recommendation": as_json(advice), "forms": as_json(studies), "protocol": made}
    text = page(studies, advice, train, heldout, about)
    with new_folder(out) as folder:
        atomic_write(folder / "analysis.md", text)
        atomic_write(folder / "analysis.json", json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        draw(studies, train, heldout, folder / "analysis.png")
    print(f"{text}\n{out}: analysis.md, analysis.json, analysis.png")


if __name__ == "__main__":
    cli.run(main, FLAGS)
