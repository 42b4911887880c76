"""Prompts to text embeddings on disk.

    python -m egrpo_jax.encode --config configs/flux_lora.py --prompt_file prompts.txt --out embeddings

Then `--config.model.published.embeddings=embeddings` trains and samples without the text encoders. Each prompt is
encoded once; a job that was interrupted goes on where it was, and prompts can be added later, by one job at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from absl import flags

from egrpo_jax import cli
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.lock import owned
from egrpo_jax.data.embeddings import write_embeddings
from egrpo_jax.data.prompts import read_prompts
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.pipelines import load_encoder
from egrpo_jax.training.config import TrainConfig

FLAGS = flags.FlagValues()
CONFIG = cli.define_config(FLAGS)
PROMPT_FILE = flags.DEFINE_multi_string(
    "prompt_file",
    None,
    "Prompts from a file (txt, JSON, JSONL, CSV or TSV) or a built-in set",
    required=True,
    flag_values=FLAGS,
)
OUT = flags.DEFINE_string("out", None, "Folder for the embeddings.", required=True, flag_values=FLAGS)
BATCH = flags.DEFINE_integer("batch", 8, "Prompts encoded at once.", lower_bound=1, flag_values=FLAGS)
SHARD_SIZE = flags.DEFINE_integer(
    "shard_size", 256, "Prompts in a file; 4 MiB each for FLUX.1-dev.", lower_bound=1, flag_values=FLAGS
)


def main() -> None:
    """Encodes what is not there yet."""
    config = from_config_dict(TrainConfig, CONFIG.value)
    prompts = [prompt for source in PROMPT_FILE.value for prompt in read_prompts(source)]
    encoder = load_encoder(config.model)

    def encode(part: Sequence[str]) -> dict[str, np.ndarray]:
        return {name: np.asarray(array) for name, array in encoder(part)._asdict().items()}

    with owned(OUT.value, "the folder of embeddings"), jax.set_mesh(make_mesh(config.mesh)):
        prompts = [*encoder.always, *prompts]
        made = write_embeddings(OUT.value, prompts, encode, encoder.settings, BATCH.value, SHARD_SIZE.value)
    print(f"{made} prompts encoded, {len(set(prompts)) - made} were there already: {OUT.value}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
