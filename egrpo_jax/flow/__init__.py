"""Flows: time grids, random steps and their entropy, one transition, and the ODE's solvers."""

from egrpo_jax.flow.entropy import Merge, exp_entropy, merge_by_entropy, merges_by_entropy, noise_by_entropy
from egrpo_jax.flow.grid import Times, empirical_shift, resolution_shift, shifted_times
from egrpo_jax.flow.process import Cps, DanceSde, ExactByStd, ExactSde, FlowByStd, FlowSde, Ode, Process
from egrpo_jax.flow.solver import DpmSolver2M, Euler, Solver, VelocityFn, solve, solve_path, tail_steps
from egrpo_jax.flow.transition import Kernel, draw, euler_step, log_prob

__all__ = [
    "Cps",
    "DanceSde",
    "DpmSolver2M",
    "Euler",
    "ExactByStd",
    "ExactSde",
    "FlowByStd",
    "FlowSde",
    "Kernel",
    "Merge",
    "Ode",
    "Process",
    "Solver",
    "Times",
    "VelocityFn",
    "draw",
    "empirical_shift",
    "euler_step",
    "exp_entropy",
    "log_prob",
    "merge_by_entropy",
    "merges_by_entropy",
    "noise_by_entropy",
    "resolution_shift",
    "shifted_times",
    "solve",
    "solve_path",
    "tail_steps",
]
