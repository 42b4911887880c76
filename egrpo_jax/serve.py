"""Serves a reward over HTTP, for training runs elsewhere.

    python -m egrpo_jax.serve --reward hpsv2.1

Speaks the API "scores" (rewards/remote/scores.py): POST of images and prompts to /, which answers their scores;
GET of / says which reward this is. An error is `{"error": one line}` with a status of 4xx, the client's, or 5xx, the
reward's. Images are rounded to 8 bits on their way. There is no authentication: listen on loopback or a private
network.
"""

from __future__ import annotations

import sys

from absl import flags

from egrpo_jax import cli
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.errors import UserError
from egrpo_jax.rewards.config import ScorersConfig
from egrpo_jax.rewards.registry import load_reward
from egrpo_jax.rewards.remote.server import ScoreServer, serve

FLAGS = flags.FlagValues()
CONFIG = cli.define_config(FLAGS, required=False)
REWARD = flags.DEFINE_string(
    "reward", None, "A built-in reward, or module:attribute of your own.", required=True, flag_values=FLAGS
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.", flag_values=FLAGS)
PORT = flags.DEFINE_integer(
    "port", 8000, "Port to listen on; 0: any that is free.", lower_bound=0, upper_bound=65535, flag_values=FLAGS
)


def main() -> None:
    """Loads the reward and serves it until a signal."""
    config = {} if CONFIG.value is None else CONFIG.value.to_dict().get("scorers", {})
    reward = load_reward(REWARD.value, from_config_dict(ScorersConfig, config, prefix="scorers."))
    try:
        server = ScoreServer(REWARD.value, reward, HOST.value, PORT.value)
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host={HOST.value} --port={PORT.value}: {error}") from None
    host = f"[{HOST.value}]" if ":" in HOST.value else HOST.value
    print(f"{REWARD.value} on http://{host}:{server.port}", file=sys.stderr, flush=True)
    serve(server)


if __name__ == "__main__":
    cli.run(main, FLAGS)
