"""The loop in PyTorch that benchmarks/iteration.py compares with computes what our engine does."""

import jax
import pytest

from benchmarks import iteration
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from tests.benchmarks.sizes import CONFIG, SHAPE

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

torch.set_num_threads(1)  # threads that wait for one another are slow where tests run side by side


@pytest.mark.slow
def test_the_loop_is_ours_and_calls_the_model_for_each_sample():
    from benchmarks.torch_loop import TorchLoop

    with jax.set_mesh(make_mesh(MeshConfig())):
        ours = iteration.Ours(SHAPE, CONFIG)
        loop = TorchLoop(SHAPE, ours.params["flow"], ours.job.plan, CONFIG)
        iteration.compare(ours, loop)
    parts = iteration.their_parts(ours, loop)
    for part in parts:
        part()
    plan, samples = ours.job.plan, 2 * ours.job.plan.decodes
    rollout = 2 * plan.rollout_passes + samples  # and one for the branch of each sample
    assert [part.calls for part in parts] == [rollout, rollout, samples, samples, 2 * plan.training_passes]
