"""Flows: time grids, noise and entropy of a step, one transition, and the ODE."""

from egrpo_jax.flow.entropy import Merge, exp_entropy, merge_by_entropy, merges_by_entropy, sigma
from egrpo_jax.flow.grid import Times, resolution_shift, shifted_times
from egrpo_jax.flow.solver import VelocityFn, solve, solve_path, tail_steps
from egrpo_jax.flow.transition import Kernel, draw, euler_step, log_prob, sde_kernel

__all__ = [
    "Kernel",
    "Merge",
    "Times",
    "VelocityFn",
    "draw",
    "euler_step",
    "exp_entropy",
    "log_prob",
    "merge_by_entropy",
    "merges_by_entropy",
    "resolution_shift",
    "sde_kernel",
    "shifted_times",
    "sigma",
    "solve",
    "solve_path",
    "tail_steps",
]
