"""How benchmarks measure time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


def alternate(runs: Sequence[Callable[[], object]], rounds: int) -> np.ndarray:
    """Seconds `[rounds, runs]`, taken in turns after one call of each that is not counted; a run is over when its call
    returns."""
    for run in runs:
        run()
    taken = np.zeros((rounds, len(runs)))
    for row in taken:
        for column, run in enumerate(runs):
            start = time.perf_counter()
            run()
            row[column] = time.perf_counter() - start
    return taken


def matmul_rate(size: int = 8192, rounds: int = 10) -> float:
    """Operations a second of one large bfloat16 matrix product, the ceiling that utilisation is a share of."""
    matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / alternate([lambda: product(matrix).block_until_ready()], rounds).min()
