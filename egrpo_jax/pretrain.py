"""Trains the models that ship with the package, from OpenMoji's images and Unicode's names.

    python -m egrpo_jax.pretrain --config configs/emoji_towers.py:text
    python -m egrpo_jax.pretrain --config configs/emoji_towers.py:reward      (then judge, weak)
    python -m egrpo_jax.pretrain --config configs/emoji_pretrain.py           (the flow model; needs text and judge)

Each takes some minutes on two CPU cores. The result goes to --output, by default the package's own assets.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from egrpo_jax import cli
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.errors import ConfigError
from egrpo_jax.pretraining import flow, text, towers
from egrpo_jax.weights.assets import asset_path


class Program(NamedTuple):
    """A kind of training: its config, what runs it, and which asset it makes."""

    job: type[Any]
    train: Callable[[Any, str | os.PathLike[str]], dict[str, float]]
    asset: Callable[[Any], str]


PROGRAMS = {
    "text": Program(text.TextJob, text.train, lambda _: "text_encoder"),
    "tower": Program(towers.TowerJob, towers.train, lambda job: job.name),
    "flow": Program(flow.FlowJob, flow.train, lambda _: "flow"),
}
FLAGS = flags.FlagValues()
CONFIG = cli.define_config(FLAGS)
OUTPUT = flags.DEFINE_string(
    "output", None, "File to write; default: the asset of that name in the package.", flag_values=FLAGS
)


def main() -> None:
    """Runs the job that the config describes, and prints what it reached."""
    config = CONFIG.value
    if config.get("kind") not in PROGRAMS:
        raise ConfigError("kind", config.get("kind"), f"one of {', '.join(PROGRAMS)}")
    program = PROGRAMS[config.kind]
    job = from_config_dict(program.job, config)
    output = Path(OUTPUT.value) if OUTPUT.value else asset_path(f"{program.asset(job)}.safetensors")
    for name, value in program.train(job, output).items():
        print(f"{name} {value:.4g}")
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    cli.run(main, FLAGS)
