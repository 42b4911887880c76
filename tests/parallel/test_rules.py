"""Which axes of which parameters are split."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from egrpo_jax.parallel.rules import sharding, shardings
from egrpo_jax.pipelines.families import FLUX

MESH = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("flow/double_blocks/image_qkv/to_q/kernel", (19, 3072, 3072), (None, "fsdp", "tensor")),
        ("flow/double_blocks/image_out/kernel", (19, 3072, 3072), (None, "tensor", "fsdp")),
        ("flow/double_blocks/image_out/kernel/values", (19, 3072, 3072), (None, "tensor", "fsdp")),
        ("flow/double_blocks/image_out/kernel/scale", (19, 1, 3072), (None, None, None)),
        ("flow/single_blocks/qkv/to_q/kernel/values", (38, 3072, 3072), (None, "fsdp", "tensor")),
        ("flow/double_blocks/text_ff/linear_2/kernel", (19, 12288, 3072), (None, "tensor", "fsdp")),
        ("flow/single_blocks/out/kernel", (38, 15360, 3072), (None, "tensor", "fsdp")),
        ("flow/time_in/linear_1/kernel", (256, 3072), ("fsdp", "tensor")),
        ("flow/image_in/kernel", (6, 3072), (None, "tensor")),  # 4 does not divide 6
        ("flow/double_blocks/image_qkv/norm_q/scale", (19, 128), (None, None)),
        ("lora/double_blocks/image_qkv/to_q/a", (19, 3072, 64), (None, "fsdp", None)),
        ("0/mu/lora/double_blocks/image_qkv/to_q/b", (19, 64, 3072), (None, None, "fsdp")),
    ],
)
def test_parameters_of_the_transformer(path, shape, expected):
    assert sharding(MESH, FLUX.rules, path, shape).spec == PartitionSpec(*expected)


def test_no_rules_mean_replication():
    tree = {"kernel": jnp.zeros((4, 4)), "count": jax.ShapeDtypeStruct((), jnp.int32)}
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(shardings(MESH, (), tree)))


def test_a_rule_for_more_axes_than_there_are():
    with pytest.raises(ValueError, match="fewer axes"):
        sharding(MESH, FLUX.rules, "flow/x/kernel", (4,))
