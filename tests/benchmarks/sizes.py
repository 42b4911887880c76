"""A model and plan small enough to be trained in a test."""

from benchmarks.gpu import MINIATURE
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.training.config import TrainConfig

SHAPE = MINIATURE.shape
CONFIG = TrainConfig(prompts_per_iteration=2, plan=EGrpo(num_steps=4, group_size=3))
