"""Weights that a name and a shape determine, so that golden files need to hold no weights."""

import zlib

import numpy as np


def random_tensor(name, shape, seed=0):
    """A float32 tensor for the published `name`: norm scales near 1, biases near 0, matrices of unit gain.

    Some variances are below any epsilon that is added to them.
    """
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    values = rng.standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        return values / np.sqrt(np.prod(shape[1:])).astype(np.float32)
    if name.endswith("running_var"):
        return values**4
    return (1 + 0.1 * values if name.endswith("weight") else 0.1 * values).astype(np.float32)


def random_tensors(shapes, seed=0):
    """A tensor for every name of `{name: shape}`."""
    return {name: random_tensor(name, tuple(shape), seed) for name, shape in shapes.items()}
