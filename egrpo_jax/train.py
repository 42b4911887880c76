"""Trains a flow model by E-GRPO.

    python -m egrpo_jax.train --config configs/emoji.py

Resumes by itself from its workdir. There: `config.json`, `metrics.jsonl`, `tb/` (TensorBoard), `eval/` (scores and
grids of images), `checkpoints/`, and at the end `reward_curve.png`, `entropy.png`, `before_after.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from egrpo_jax import cli
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.iteration import MissingScoreError, NotFiniteError
from egrpo_jax.training.loop import train

FLAGS = flags.FlagValues()
CONFIG = cli.define_config(FLAGS)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run is kept; by default runs/<config.name>.", flag_values=FLAGS
)
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on with a workdir that was made with another config.", flag_values=FLAGS
)


def main() -> None:
    """Trains, and tells how it ended."""
    config = from_config_dict(TrainConfig, CONFIG.value)
    workdir = Path(WORKDIR.value or Path("runs") / config.name)
    try:
        signal_number = train(config, workdir, ALLOW_CONFIG_CHANGE.value)
    except (MissingScoreError, NotFiniteError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if signal_number is not None:
        print(f"saved in {workdir}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + signal_number)


if __name__ == "__main__":
    cli.run(main, FLAGS)
