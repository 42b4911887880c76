"""A network over many rows: the same rows, whatever their number and wherever they are computed."""

import jax
import numpy as np
import pytest

from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.rewards.batched import Batched


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
