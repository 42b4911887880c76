"""Judges a model.

    python -m egrpo_jax.evaluate --workdir runs/emoji --out evaluation

The model of the config, and with --workdir that of a training run beside it, draw the same prompts from the same noise;
every reward of the config, or those of --rewards, scores them. --out becomes a folder: `table.md` and `table.json`,
the statistics and how they were made; `scores.jsonl`, every score; `gains.png`, what gained and lost most.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from egrpo_jax import cli
from egrpo_jax.cli.model import ModelFlags
from egrpo_jax.cli.sampling import LAST_SEED, SamplingFlags
from egrpo_jax.common.atomic import atomic_write, check_new_folder, new_folder
from egrpo_jax.common.config import to_config_dict
from egrpo_jax.common.errors import UserError
from egrpo_jax.common.trees import combine, partition
from egrpo_jax.evaluation import protocol, statistics
from egrpo_jax.evaluation.side_by_side import (
    Judging,
    Results,
    compare_all,
    features_of,
    gains_and_losses,
    sample_and_score,
    score_lines,
)
from egrpo_jax.figures.grids import save_image
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.pipelines import Pipeline, load_pipeline
from egrpo_jax.rewards import load_reward
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import image_size
from egrpo_jax.training.state import restore_trained

FLAGS = flags.FlagValues()
MODEL = ModelFlags(FLAGS)
SAMPLING = SamplingFlags(FLAGS)
OUT = flags.DEFINE_string("out", None, "New folder to write.", required=True, flag_values=FLAGS)
REWARDS = flags.DEFINE_list(
    "rewards", None, "Rewards, separated by commas; by default all of the config.", flag_values=FLAGS
)
SAMPLES = flags.DEFINE_integer("samples", 1, "Images of each prompt.", lower_bound=1, flag_values=FLAGS)
DIVERSITY = flags.DEFINE_string(
    "diversity",
    None,
    "Reward whose image features measure how far the images of a prompt are apart.",
    flag_values=FLAGS,
)


def chosen_judging(config: TrainConfig, train: Sequence[str], mesh: Mesh) -> Judging:
    """The rewards that the flags name, loaded; the first that is not among `train` is the judge."""
    names = config.rewards.train + config.rewards.heldout if REWARDS.value is None else tuple(REWARDS.value)
    if not names or len(set(names)) != len(names):
        raise UserError(f"--rewards: found {REWARDS.value}, expected names, each once")
    if DIVERSITY.value is not None and SAMPLES.value < 2:
        raise UserError(f"--diversity needs at least 2 images of each prompt, found --samples={SAMPLES.value}")
    if SAMPLING.seed + SAMPLES.value - 1 > LAST_SEED:
        raise UserError(f"--seed={SAMPLING.seed} --samples={SAMPLES.value}: the last seed is {LAST_SEED}")
    rewards = {name: load_reward(name, config.scorers, mesh) for name in names}
    judge = next((name for name in names if name not in train), names[0])
    if DIVERSITY.value is None:
        return Judging(rewards, judge, SAMPLES.value)
    reward = rewards.get(DIVERSITY.value) or load_reward(DIVERSITY.value, config.scorers, mesh)
    features = features_of(DIVERSITY.value, reward)
    return Judging(rewards, judge, SAMPLES.value, features, f"diversity ({DIVERSITY.value})")


def load_models(
    config: TrainConfig, pipeline: Pipeline, workdir: Path | None, mesh: Mesh
) -> tuple[list[Any], dict[str, Any] | None]:
    """The parameters of the base model and of the run in `workdir`, if there is one, and what the latter is."""
    if workdir is None:
        return [pipeline.load(mesh)], None
    trained, iteration = restore_trained(workdir, pipeline, config, mesh)
    base = pipeline.load(mesh)
    tuned = combine(trained, partition(base, pipeline.trainable)[1])
    made = {"workdir": str(workdir), "iteration": iteration, "ema_decay": config.learner.ema_decay}
    return [base, tuned], made


def write(out: Path, table: str, record: dict[str, Any], prompts: Sequence[str], results: Results, judge: str) -> None:
    """Writes the folder."""
    with new_folder(out) as folder:
        atomic_write(folder / "table.md", table)
        atomic_write(folder / "table.json", json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        atomic_write(folder / "scores.jsonl", score_lines(prompts, results.scores))
        if (sheet := gains_and_losses(results.pairs, judge)) is not None:
            save_image(sheet, folder / "gains.png")


def main() -> None:
    """Samples, scores, compares and writes."""
    config, workdir, out = MODEL.config(), MODEL.workdir, Path(OUT.value)
    source, prompts = SAMPLING.prompts(config.evaluation.prompts)
    train = protocol.training_rewards(config.rewards.train, workdir)
    check_new_folder(out)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        judging = chosen_judging(config, train, mesh)
        pipeline = load_pipeline(config.model)
        pipeline.require(prompts)
        for reward in judging.rewards.values():
            reward.require(prompts, image_size(pipeline))
        models, tuned = load_models(config, pipeline, workdir, mesh)
        sampling = SAMPLING.sampling(config, pipeline, len(prompts))
        results = sample_and_score(sampling.sampler(pipeline), models, prompts, SAMPLING.seed, sampling.batch, judging)
    made = {
        "base": protocol.describe_model(config.model, pipeline),
        "tuned": tuned,
        "prompts": protocol.describe_prompts(source, prompts),
        "resolution": dict(zip(("height", "width"), results.resolution, strict=True)),
        "grid": SAMPLING.grid,
        **sampling.record(),
        "seeds": list(range(SAMPLING.seed, SAMPLING.seed + judging.samples)),
        "intervals": protocol.INTERVALS,
        "versions": protocol.environment(),
        "rewards": {name: protocol.describe_reward(name, config.scorers) for name in judging.rewards},
        "config": protocol.public_config(to_config_dict(config).to_dict()),
    }
    comparisons = compare_all(results.scores, judging, train)
    table = protocol.document(comparisons, made)
    record = {"scores": [statistics.as_json(row) for row in comparisons], "protocol": made}
    write(out, table, record, prompts, results, judging.judge)
    print(f"{table}\n{out}: table.md, table.json, scores.jsonl and, if anything changed, gains.png")
    if silent := [row.name for row in comparisons if not row.prompts]:
        raise UserError(f"{', '.join(silent)}: no prompt has all its scores, of {len(prompts)}; {out} has the others")


if __name__ == "__main__":
    cli.run(main, FLAGS)
