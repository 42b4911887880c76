"""The start of every program: its flags, and a user's mistakes as one line."""

from egrpo_jax.cli.program import define_config, run

__all__ = ["define_config", "run"]
