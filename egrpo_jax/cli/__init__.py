"""How a program starts: its flags, and what happens with a user's mistake."""

from egrpo_jax.cli.program import define_config, run

__all__ = ["define_config", "run"]
