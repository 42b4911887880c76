"""Compares a small stack of blocks on a mesh of 2 x 4 devices, its weights split, with the same on one."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from egrpo_jax.models.int8 import quantise
from egrpo_jax.models.layers import Linear, scan_blocks
from egrpo_jax.parallel.fsdp import Layout
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh, over_samples, spread
from egrpo_jax.parallel.rules import with_shardings

RULES = ((r"/kernel(/values)?$", PartitionSpec("fsdp", None)),)
WIDTH, BLOCKS = 8, 3


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.RMSNorm(name="norm")(Linear(WIDTH, name="linear")(x))), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        return scan_blocks(Block, BLOCKS, remat="blocks")(name="blocks")(Linear(WIDTH, name="first")(x))[0]


def loss(params, x):
    return jnp.square(Stack().apply({"params": params}, x)).sum()


def gathered(compiled, dtype):
    """Sizes of all that is gathered in a `dtype`, as XLA calls it."""
    found = re.findall(rf"{dtype}\[([\d,]+)\]\S* all-gather", compiled.as_text())
    return [np.prod([int(n) for n in dims.split(",")]) for dims in found]


def main():
    x = jax.random.normal(jax.random.key(0), (16, WIDTH))
    params = Stack().init(jax.random.key(1), x)["params"]
    expected, expected_grads = jax.value_and_grad(loss)(params, x)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    abstract = with_shardings(mesh, RULES, params)
    layout = Layout.of(abstract)
    assert layout.specs["blocks"]["linear"]["kernel"] == PartitionSpec(None, "fsdp", None)
    assert layout.specs["blocks"]["norm"]["scale"] == PartitionSpec(None, None)

    def share(params, x):
        value, grads = jax.value_and_grad(lambda params: loss(layout.boxed(params), x))(params)
        return value[None], layout.sum_gradients(grads)

    with jax.set_mesh(mesh):
        run = jax.jit(spread(share, (layout.specs, over_samples()), (over_samples(), layout.specs)))
        split = jax.tree.map(lambda leaf, struct: jax.device_put(leaf, struct.sharding), params, abstract)
        compiled = run.lower(split, x).compile()
        values, grads = compiled(split, x)
    np.testing.assert_allclose(values.sum(), expected, rtol=1e-5)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        other = dict(jax.tree_util.tree_leaves_with_path(expected_grads))[path]
        np.testing.assert_allclose(grad, other, atol=1e-5, err_msg=str(path))
    assert grads["blocks"]["linear"]["kernel"].sharding.shard_shape((BLOCKS, WIDTH, WIDTH)) == (BLOCKS, 2, WIDTH)

    assert max(gathered(compiled, "f32")) == WIDTH * WIDTH, "more than one layer at a time"
    assert re.search(r"f32\[[\d,]+\]\S* reduce-scatter", compiled.as_text()), "gradients are not scattered"
    in_int8(mesh, params, x)


def in_int8(mesh, params, x):
    """Kernels of blocks in int8, gradients of the rest: int8 is gathered, whatever layers compute in."""
    kernel = quantise(np.asarray(params["blocks"]["linear"]["kernel"]))
    blocks = params["blocks"] | {"linear": params["blocks"]["linear"] | {"kernel": kernel}}
    expected = jax.grad(lambda first: loss({"first": first, "blocks": nn.meta.unbox(blocks)}, x))(params["first"])
    abstract = with_shardings(mesh, RULES, {"first": params["first"], "blocks": blocks})
    layout = Layout.of(abstract, jnp.float32)

    def share(params, x):
        value = lambda first: loss(layout.boxed(params | {"first": first}), x)
        return Layout(layout.specs["first"]).sum_gradients(jax.grad(value)(params["first"]))

    with jax.set_mesh(mesh):
        run = jax.jit(spread(share, (layout.specs, over_samples()), layout.specs["first"]))
        params = layout.working_copy(params | {"blocks": blocks})
        split = jax.tree.map(lambda leaf, struct: jax.device_put(leaf, struct.sharding), params, abstract)
        compiled = run.lower(split, x).compile()
        grads = compiled(split, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, expected)
    assert max(gathered(compiled, "s8")) == WIDTH * WIDTH, "more than one layer at a time"
    assert len(gathered(compiled, "f32")) == 1, "more than the first layer is gathered in float32"


if __name__ == "__main__":
    main()
