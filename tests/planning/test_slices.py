"""TPU slices that are not there: full-size FLUX.1-dev fits, and no chip repeats another's work."""

import dataclasses
import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest

from configs import flux2_klein_lora, sd35_lora
from egrpo_jax.common.errors import UserError
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.pipelines import ModelConfig
from egrpo_jax.pipelines.published import FLOW_GRPO, PublishedOptions
from egrpo_jax.planning import hlo
from egrpo_jax.planning.cost import kept_beside, phase_cost
from egrpo_jax.planning.devices import GIB, capacity, slice_devices
from egrpo_jax.planning.phases import named_arguments, refused_bytes, sketch_job
from egrpo_jax.planning.report import overview
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.optimizer import OptimConfig
from egrpo_jax.training.config import RewardsConfig, TrainConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`"),
]
CHIPS = 4


@functools.cache
def job_and_cost(phase, kind, offload=False):
    # Fused attention repeats a part of itself in its backward pass; XLA's compares with arithmetic.
    options = PublishedOptions(embeddings="made before", lora=FLOW_GRPO if kind == "lora" else None, attention="xla")
    config = TrainConfig(
        prompts_per_iteration=8,
        tails_per_device=12,
        model=ModelConfig("published", "black-forest-labs/FLUX.1-dev", options),
        rewards=RewardsConfig(train=("hpsv2.1",)),
        learner=LearnerConfig(micro_batch=1),
        optim=OptimConfig(offload=offload),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
    mesh = make_mesh(config.mesh, slice_devices("v5p:2x2x1"))
    with jax.set_mesh(mesh):
        job = sketch_job(config)
        return job, phase_cost(job, mesh, phase)


def largest(cost, kind, where=lambda _: True):
    collectives = cost.compiled.work.collectives
    return max((each.whole for each in collectives if each.kind == kind and where(each)), default=0)


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("phase", ["rollout", "update"])
def test_a_phase_fits_and_repeats_nothing(phase, kind):
    job, cost = job_and_cost(phase, kind)
    assert cost.fits
    assert cost.compiled.work.unknown_loops == ()
    assert 0.9 < cost.repeated <= 1.03
    assert largest(cost, "all-reduce", lambda each: each.in_loop) <= 1e6
    block = [leaf.shape[1:] for leaf in jax.tree.leaves(job.pipeline.abstract_params["flow"]["double_blocks"])]
    assert 0 < largest(cost, "all-gather") <= 2 * sum(map(math.prod, block))  # in bfloat16


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_optimizers_state_lies_over_all_chips(kind):
    job, cost = job_and_cost("update", kind)
    trained = job.pipeline.abstract_params["lora" if kind == "lora" else "flow"]
    moments = 2 * 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained))
    assert cost.compiled.arguments["moments"] <= 1.01 * moments / CHIPS
    assert cost.compiled.memory.arguments <= 1.01 * sum(cost.compiled.arguments.values())


def test_moments_that_rest_on_the_hosts_take_no_memory_in_an_update():
    """They pass through a layer at a time: what an update needs meanwhile grows by less than a hundredth of them."""
    usual, resting = job_and_cost("update", "full")[1], job_and_cost("update", "full", offload=True)[1]
    moments = usual.compiled.arguments["moments"]
    assert usual.compiled.memory.arguments - resting.compiled.memory.arguments >= 0.99 * moments
    assert resting.compiled.memory.temporaries - usual.compiled.memory.temporaries <= 0.01 * moments


@pytest.mark.parametrize("topology", ["v5p:2x2x2", "tpu7x:2x2x1"])
def test_transfers_are_counted_wherever_the_compiler_puts_them(topology):
    mesh, layers, size = make_mesh(MeshConfig(data=-1, fsdp=4), slice_devices(topology)), 6, 4096

    def walk(x, layers):
        gathered = lambda layer: jax.lax.all_gather(layer, "fsdp", axis=0, tiled=True)
        return jax.lax.scan(lambda x, layer: (x @ gathered(layer), None), x, layers)[0]

    samples, split = jax.P(("data", "fsdp")), jax.P(None, "fsdp")
    shaped = lambda shape, spec: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
    walk = jax.jit(jax.shard_map(walk, mesh=mesh, in_specs=(samples, split), out_specs=samples))
    program = walk.lower(shaped((64, size), samples), shaped((layers, size, size), split)).compile()
    wire = hlo.measure(hlo.parse(program.as_text())).wire
    assert wire == {"all-gather": layers * 3 / 4 * 2 * size**2}


def test_the_compilers_refusal_is_understood():
    where = jax.sharding.SingleDeviceSharding(slice_devices("v6e:2x2")[0])
    matrix = jax.ShapeDtypeStruct((60_000, 1_000_000), jnp.float32, sharding=where)
    with pytest.raises(jax.errors.JaxRuntimeError) as refusal:
        jax.jit(lambda x: x @ x.T + 1).lower(matrix).compile()
    assert refused_bytes(refusal.value) >= 4 * 60_000 * 1_000_000


def test_weights_may_be_split_over_a_part_of_a_slices_side():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=8), slice_devices("v6e:4x4"))
    assert mesh.shape == {"data": 2, "fsdp": 8, "tensor": 1}
    for row in mesh.devices.reshape(2, 8):
        x, y, _ = zip(*(device.coords for device in row), strict=True)
        assert len(set(x)) * len(set(y)) == 8  # neighbours


@pytest.mark.parametrize("config", [sd35_lora.SD35_LORA, flux2_klein_lora.FLUX2_KLEIN_LORA], ids=lambda c: c.name)
@pytest.mark.parametrize("phase", ["rollout", "update"])
def test_adapters_of_a_guided_model_fit_one_small_chip(phase, config):
    # XLA's attention compares with arithmetic: fused, it pads 1357 tokens to 1536, and takes less memory.
    options = dataclasses.replace(config.model.published, embeddings="made before", attention="xla")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, published=options))
    mesh = make_mesh(config.mesh, slice_devices("v5e:1x1"))
    with jax.set_mesh(mesh):
        job = sketch_job(config)
        cost = phase_cost(job, mesh, phase)
    assert job.pipeline.passes == 2
    assert cost.fits
    assert cost.compiled.work.unknown_loops == ()
    assert not cost.compiled.work.collectives
    assert 0.9 < cost.repeated <= 1.03


@pytest.mark.parametrize("topology", ["v9:2x2", "v5p", "v5p:3x2x1"])
def test_slices_that_there_are_not(topology):
    with pytest.raises(UserError, match=f"--topology: found '{topology}', expected a slice, as v4:2x2x1"):
        slice_devices(topology)


@pytest.mark.parametrize(
    ("topology", "devices", "gibibytes"), [("v4:2x2x1", 4, 30.75), ("v6e:2x4", 8, 31.25), ("tpu7x:2x2x1", 8, 94.75)]
)
def test_devices_of_a_slice(topology, devices, gibibytes):
    """A chip of v4 is one device, one of TPU7x two."""
    found = slice_devices(topology)
    assert (len(found), capacity(found[0])) == (devices, gibibytes * GIB)


def test_nothing_is_computed_on_a_slice():
    """Its devices compile, and run nothing."""
    rewards = RewardsConfig(train=("hpsv2.1",), heldout=("imagereward",))
    config = TrainConfig(model=ModelConfig("published", "black-forest-labs/FLUX.1-dev"), rewards=rewards)
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1), slice_devices("v5p:2x2x2"))
    with jax.set_mesh(mesh):
        job = sketch_job(config)
        assert overview(job, mesh, 0.4)
        moments = named_arguments(job, mesh, "update")["moments"]
        assert kept_beside(job, mesh, "rollout")["moments"] == moments
    assert moments == pytest.approx(8 * 11.9e9 / 8, rel=0.01)
