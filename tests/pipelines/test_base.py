"""A pipeline apart from its parameters: compiled without them, read once, laid out once."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.trees import combine, partition
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.pipelines import ModelConfig, Pipeline, load_pipeline
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.optimizer import make_optimizer
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import Job
from egrpo_jax.training.phases import make_phases
from egrpo_jax.training.state import abstract_state

MESH = make_mesh(MeshConfig())


def made(**changes):
    """A pipeline with the parameters {"flow": {"w", "b"}, "decoder"}, and a list of what it was asked to read."""
    asked = []

    def init():
        return {"flow": {"w": np.ones((4, 2), np.float32), "b": np.zeros(2, np.float32)}, "decoder": np.ones(3, "f")}

    def read(wanted):
        asked.append(wanted)
        return init()

    fields = {
        "velocity": lambda *_: None,
        "abstract_params": jax.eval_shape(init),
        "read": read,
        "encode": lambda _: None,
        "decode": lambda *_: None,
        "latents_shape": (1, 1),
        "rules": (("flow/w", PartitionSpec("fsdp", None)),),
        "trainable": "^flow/",
    }
    return Pipeline(**fields | changes), asked


class Arrays:
    """The arrays that came to life within the block, on devices, and are alive at its end."""

    def __enter__(self):
        gc.collect()
        self._before = jax.live_arrays()  # kept, so that no new array takes the place of an old one
        return self

    def __exit__(self, *_):
        gc.collect()
        known = {id(array) for array in self._before}
        self.num_bytes = sum(array.nbytes for array in jax.live_arrays() if id(array) not in known)


def num_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_a_pipeline_is_a_key_and_says_where_its_parameters_belong():
    pipeline, _ = made()
    assert {pipeline: 1}[pipeline] == 1
    abstract = pipeline.abstract(MESH)
    assert abstract["flow"]["w"].sharding.spec == PartitionSpec("fsdp", None)
    assert abstract["decoder"].sharding.is_fully_replicated


def test_parameters_are_laid_out_by_the_rules():
    pipeline, asked = made()
    params = pipeline.load(MESH)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == jax.tree.map(lambda s: s.sharding, asked[0])
    assert asked == [pipeline.abstract(MESH)]
    np.testing.assert_array_equal(params["flow"]["w"], np.ones((4, 2)))


@pytest.mark.parametrize(
    ("trainable", "parts"), [("^flow/", ["decoder"]), ("w$", ["decoder", "flow"]), ("^decoder", ["flow"]), ("", [])]
)
def test_the_frozen_part_is_read_without_what_is_trained_whole(trainable, parts):
    pipeline, asked = made(trainable=trainable)
    trained, frozen = partition(pipeline.load(MESH), trainable)
    del asked[:]
    loaded = pipeline.load_frozen(MESH)
    assert [sorted(wanted) for wanted in asked] == ([parts] if parts else [])
    assert jax.tree.structure(loaded) == jax.tree.structure(frozen)
    assert len(jax.tree.leaves(combine(trained, loaded))) == 3


@pytest.mark.parametrize(
    ("flow", "message"),
    [
        ({"w": np.ones((4, 2), "f")}, r"nothing for the parameter flow/b, its abstract_params say float32\[2\]"),
        ({"w": np.ones((4, 2), "f"), "b": np.ones(3, "f")}, r"float32\[3\] for the parameter flow/b"),
        ({"w": np.ones((4, 2), "i"), "b": np.ones(2, "f")}, r"int32\[4, 2\] for the parameter flow/w"),
    ],
)
def test_other_parameters_than_promised(flow, message):
    pipeline, _ = made(read=lambda _: {"flow": flow, "decoder": np.ones(3, "f")})
    with pytest.raises(UserError, match=message):
        pipeline.load(MESH)


def test_nothing_to_train():
    with pytest.raises(UserError, match="trainable '\\^vae/' is found in no parameter's path"):
        made(trainable="^vae/")


def test_an_iteration_of_the_embedded_model_compiles_without_an_array():
    config = TrainConfig(prompts_per_iteration=2, plan=EGrpo(num_steps=4, group_size=2))
    with Arrays() as arrays, jax.set_mesh(MESH):
        pipeline = load_pipeline(ModelConfig())
        params = pipeline.abstract(MESH)
        _, frozen = partition(params, pipeline.trainable)
        job = Job(config, config.plan.make_plan(), pipeline, {}, [], [], make_optimizer(config.optim))
        phases = make_phases(job)
        text = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), pipeline.encode(["owl", "key"]))
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
        rollout = phases.rollout.lower(params, (), text, keys)
        transitions, latents = rollout.out_info
        decode = phases.decode.lower(params, jax.ShapeDtypeStruct((4, *pipeline.latents_shape), jnp.float32))
        advantage = jax.ShapeDtypeStruct(transitions[0].log_prob.shape, jnp.float32)
        weights = jax.ShapeDtypeStruct((2,), jnp.float32)
        update = phases.update.lower(
            abstract_state(job, MESH), frozen, transitions, advantage, weights, np.int32(0), text
        )
        assert latents.shape[-2:] == pipeline.latents_shape
        for lowered in (rollout, decode, update):
            assert lowered.compile().cost_analysis()
    assert arrays.num_bytes == 0


def test_the_embedded_model_is_held_once():
    pipeline = load_pipeline(ModelConfig())
    with Arrays() as arrays:
        params = pipeline.load(MESH)
    assert arrays.num_bytes == num_bytes(pipeline.abstract_params) == num_bytes(params) > 10**6
