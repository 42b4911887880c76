"""Every algorithm on the embedded emoji model with equal forward passes, for `python -m benchmarks.compare_algorithms`.

    python -m egrpo_jax.train --config configs/sweeps/algorithms.py:egrpo

Model, prompts, prompts an iteration and optimizer are one for all; schedule, credit and loss are those of
`configs/algorithms/*.py:emoji`. What differs in cost has more or fewer iterations: a backward pass counts as two
forward passes. The weights that are judged are an average over the last tenth of a run, however many iterations that
are: a longer one would hold back those that have few. Hardware: 2 CPU cores; a run takes 2 to 5 minutes on one of them.
"""

import dataclasses
import runpy
from pathlib import Path

import ml_collections

from egrpo_jax.common.config import from_config_dict
from egrpo_jax.rl.algorithms.base import ALGORITHMS
from egrpo_jax.training.config import EvaluationConfig, TrainConfig, train_config

FOLDER = Path(__file__).parent.parent / "algorithms"
BUDGET = 57_600
"""Forward passes of a run, those of 30 iterations of E-GRPO."""
EVALUATIONS = 5
RATES = ("1e-4", "2e-4", "4e-4")
"""Learning rates to begin with, of which each entry takes its best."""


def cost(config: TrainConfig, iteration: int) -> int:
    """Forward passes of an iteration, counted from 0."""
    plan = config.plan.make_plan(iteration, config.seed)
    return config.prompts_per_iteration * (plan.rollout_passes + plan.update_equivalents(config.learner))


def within(config: TrainConfig, budget: int) -> TrainConfig:
    """`config` with as many iterations as the budget has passes for, and evaluations evenly spread over them."""
    iterations, spent = 0, 0
    while (spent := spent + cost(config, iterations)) <= budget:
        iterations += 1
    return lasting(config, iterations)


def lasting(config: TrainConfig, iterations: int) -> TrainConfig:
    """`config` with so many iterations, evaluations evenly spread over them, and an average over the last tenth."""
    evaluation = dataclasses.replace(config.evaluation, every=max(1, iterations // EVALUATIONS))
    learner = dataclasses.replace(config.learner, ema_decay=1 - 10 / iterations if iterations > 10 else None)
    return dataclasses.replace(config, num_iterations=iterations, evaluation=evaluation, learner=learner)


def entry(name: str, budget: int = BUDGET, **changes) -> TrainConfig:
    """An algorithm's run on the emoji model, with `changes` to its config."""
    config = runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"]("emoji")
    config = dataclasses.replace(from_config_dict(TrainConfig, config), **changes)
    return within(dataclasses.replace(config, evaluation=EvaluationConfig(kept=1)), budget)


def get_config(variant: str = "egrpo") -> ml_collections.ConfigDict:
    """The config of one of the package's algorithms."""
    if variant not in ALGORITHMS:
        raise ValueError(f"configs/sweeps/algorithms.py has the variants {sorted(ALGORITHMS)}, found {variant!r}")
    return train_config(entry(variant))


ENTRIES = tuple(ALGORITHMS)
