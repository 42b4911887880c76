"""How a program starts: its flags, and what happens with a user's mistake."""

from egrpo_jax.cli.program import CONFIG, run

__all__ = ["CONFIG", "run"]
