"""Prints the resident kB, without files, of each iteration of the toy: `measure_memory.py WORKDIR ITERATIONS`.

It evaluates and saves at the ends only: of every checkpoint that Orbax writes, it keeps some 20 kB.
"""

import dataclasses
import re
import sys
from pathlib import Path

from egrpo_jax.common.config import from_config_dict
from egrpo_jax.training import loop
from egrpo_jax.training.config import TrainConfig
from tests import toy


def main(workdir, iterations):
    config = from_config_dict(TrainConfig, toy.get_config())
    config = dataclasses.replace(
        config,
        num_iterations=int(iterations),
        evaluation=dataclasses.replace(config.evaluation, every=int(iterations)),
        checkpoint=dataclasses.replace(config.checkpoint, every=int(iterations)),
    )
    found = []

    def show(*_):
        found.append(int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1]))

    loop.show = show
    loop.train(config, Path(workdir))
    print(*found)


if __name__ == "__main__":
    main(*sys.argv[1:])
