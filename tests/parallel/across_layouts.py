"""Writes the emoji model's state on each of several meshes of 1 to 8 devices, and reads it on every other."""

import contextlib
import tempfile

import jax
import numpy as np

from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.run.checkpoint import Checkpoints
from egrpo_jax.training.config import RewardsConfig, TrainConfig
from egrpo_jax.training.job import make_job
from egrpo_jax.training.state import abstract_state

LAYOUTS = ((1, 1, 1), (8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2))


def abstract(config, layout):
    mesh = make_mesh(MeshConfig(*layout), jax.devices()[: np.prod(layout)])
    with jax.set_mesh(mesh):
        return abstract_state(make_job(config, mesh), mesh)


def fill(leaf, rng):
    """Whatever its type may hold: all bits count."""
    size = leaf.size * leaf.dtype.itemsize
    values = np.frombuffer(rng.bytes(size), f"u{leaf.dtype.itemsize}") % (1 << 30)  # no nan, no infinity
    return values.view(leaf.dtype).reshape(leaf.shape)


def main():
    config = TrainConfig(rewards=RewardsConfig(train=("tests.toy:brightness",)))
    states = {layout: abstract(config, layout) for layout in LAYOUTS}
    rng = np.random.default_rng(0)
    values = jax.tree.map(lambda leaf: fill(leaf, rng), states[1, 1, 1])
    split = [leaf.sharding.shard_shape(leaf.shape) != leaf.shape for leaf in jax.tree.leaves(states[2, 2, 2])]
    assert sum(split) > len(split) / 3
    for wrote, written in states.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(Checkpoints(folder)) as checkpoints:
            checkpoints.save(
                1, jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), values, written), {}
            )
            checkpoints.wait()
            for read, wanted in states.items():
                _, found, _ = checkpoints.restore_latest(wanted)
                for leaf, like, value in zip(*map(jax.tree.leaves, (found, wanted, values)), strict=True):
                    assert leaf.sharding == like.sharding, (wrote, read)
                    np.testing.assert_array_equal(leaf, value, err_msg=f"{wrote} to {read}")


if __name__ == "__main__":
    main()
