"""Cutting parameter trees in two and putting them together."""

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.common.trees import combine, partition

TREE = {"flow": {"a": jnp.ones(2), "b": jnp.zeros(3)}, "lora": [jnp.arange(4), jnp.ones(())]}


def test_a_part_and_the_rest_make_the_whole():
    part, rest = partition(TREE, r"^lora/|/b$")
    assert [leaf.size for leaf in jax.tree.leaves(part)] == [3, 4, 1]
    assert [leaf.size for leaf in jax.tree.leaves(rest)] == [2]
    chex.assert_trees_all_equal(combine(part, rest), TREE)
    chex.assert_trees_all_equal(combine(rest, part), TREE)


def test_everything_and_nothing():
    part, rest = partition(TREE, "")
    chex.assert_trees_all_equal(part, TREE)
    assert not jax.tree.leaves(rest)
    assert not jax.tree.leaves(partition(TREE, "nothing")[0])


def test_only_the_part_gets_a_gradient():
    part, rest = partition(TREE, "^flow/a")
    gradient = jax.grad(lambda p: (combine(p, rest)["flow"]["a"] ** 2).sum())(part)
    chex.assert_trees_all_equal(gradient["flow"]["a"], 2 * jnp.ones(2))
    assert len(jax.tree.leaves(gradient)) == 1
