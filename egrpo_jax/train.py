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
from egrpo_jax.parallel import hosts
from egrpo_jax.run.profile import Window
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.loop import train

FLAGS = flags.FlagValues()
CONFIG = cli.define_config(FLAGS)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run is kept; by default runs/<config.name>.", flag_values=FLAGS
)
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "Go on with a workdir that was made with another config.", flag_values=FLAGS
)
PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "Iterations FIRST:LAST, as in 3:5, to profile, for TensorBoard; see docs/scaling.md.",
    flag_values=FLAGS,
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Of several processes that nothing else tells of one another: HOST:PORT of the process 0.",
    flag_values=FLAGS,
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "With --coordinator: processes in all.", lower_bound=1, flag_values=FLAGS
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "With --coordinator: the number of this process, from 0.", lower_bound=0, flag_values=FLAGS
)


def main() -> None:
    """Trains, and tells how it ended."""
    config = from_config_dict(TrainConfig, CONFIG.value)
    profile = None if PROFILE.value is None else Window.parse(PROFILE.value)
    workdir = Path(WORKDIR.value or Path("runs") / config.name)
    hosts.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    try:
        with hosts.together():
            signal_number = train(config, workdir, ALLOW_CONFIG_CHANGE.value, profile)
    except hosts.SharedError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if signal_number is not None:
        print(f"saved in {workdir}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + signal_number)


if __name__ == "__main__":
    cli.run(main, FLAGS)
