"""A network over many rows: the same rows, whatever their number and wherever they are computed."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.rewards.batched import Batched
from tests.programs import ROOT


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 13])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_any_number_of_rows_gives_each_its_own_output(rows, batch):
    largest = []

    def network(params, images, texts):
        largest.append(len(images))
        return {"score": (images.sum((1, 2)) * params["scale"] + texts), "image": images}

    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(rows, 3, 2)).astype(np.float32), rng.normal(size=rows).astype(np.float32)
    outputs = Batched(network, {"scale": np.float32(2)}, batch, make_mesh(MeshConfig()))(images, texts)
    np.testing.assert_allclose(outputs["score"], images.sum((1, 2)) * 2 + texts, rtol=1e-6)
    np.testing.assert_array_equal(outputs["image"], images)
    assert max(largest) <= batch


def test_it_is_compiled_once_for_a_shape():
    traces = []

    def network(_, images):
        traces.append(1)
        return images.mean(-1)

    run = Batched(network, {}, 2, make_mesh(MeshConfig()))
    for seed in range(3):
        run(jax.random.normal(jax.random.key(seed), (4, 3)))
    assert len(traces) == 1


ON_A_MESH = """
import jax, numpy as np
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.rewards.batched import Batched

mesh = make_mesh(MeshConfig(data=4, fsdp=2))
run = Batched(lambda params, images: images.mean((1, 2)) * params, np.float32(2), 2, mesh)
images = np.random.default_rng(0).normal(size=(13, 3, 2)).astype(np.float32)
with jax.set_mesh(mesh):  # as in training
    np.testing.assert_allclose(run(images), 2 * images.mean((1, 2)), rtol=1e-6)
    spread = jax.device_put(images[:8], jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
    outputs = run(spread)
    assert outputs.sharding.spec[0] == ("data", "fsdp")
np.testing.assert_allclose(outputs, 2 * images[:8].mean((1, 2)), rtol=1e-6)
np.testing.assert_allclose(run(images), 2 * images.mean((1, 2)), rtol=1e-6)
"""


def test_rows_are_spread_over_the_mesh():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
