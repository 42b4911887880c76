"""Compiles small programs for 4 CPU devices and prints what `hlo.measure` finds in them, as JSON."""

import functools
import json

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from egrpo_jax.planning import hlo

SPLIT, WHOLE = PartitionSpec("x"), PartitionSpec()
SIZE = 64


def shape(*axes):
    return jax.ShapeDtypeStruct(axes, jnp.float32)


def scanned(turns, body):
    return lambda x, w: jax.lax.scan(lambda carry, _: (body(carry, w), None), x, length=turns)[0]


def product(x, w):
    return jnp.tanh(x @ w)


def until(x, turns):
    return jax.lax.fori_loop(0, turns, lambda _, carry: jnp.tanh(carry @ carry), x)


def convolution(images, kernel):
    return jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def spread(function, out_spec):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=(SPLIT,), out_specs=out_spec, check_vma=False)


def gathered_in_a_scan(part):
    """Gathers a fourth of a matrix in each of 5 turns, and multiplies."""

    def turn(carry, _):
        whole = jax.lax.all_gather(jnp.tanh(part * carry[0, 0]), "x", tiled=True)
        return carry @ whole, None

    return jax.lax.scan(turn, jnp.ones((8, SIZE)), length=5)[0][None]


PROGRAMS = {
    "product": (product, shape(SIZE, SIZE), shape(SIZE, SIZE)),
    "scan": (scanned(7, product), shape(SIZE, SIZE), shape(SIZE, SIZE)),
    "nested": (scanned(3, scanned(5, product)), shape(SIZE, SIZE), shape(SIZE, SIZE)),
    "backward": (
        jax.grad(lambda x, w: scanned(7, product)(x, w).sum(), argnums=(0, 1)),
        shape(SIZE, SIZE),
        shape(SIZE, SIZE),
    ),
    "unknown": (until, shape(SIZE, SIZE), jax.ShapeDtypeStruct((), jnp.int32)),
    "convolution": (convolution, shape(2, 8, 8, 4), shape(3, 3, 4, 16)),
    "gather": (spread(gathered_in_a_scan, SPLIT), shape(SIZE, SIZE)),
    "sum": (spread(lambda x: jax.lax.psum(x, "x"), WHOLE), shape(SIZE, SIZE)),
    "scatter": (spread(functools.partial(jax.lax.psum_scatter, axis_name="x", tiled=True), SPLIT), shape(SIZE, SIZE)),
    "shift": (
        spread(lambda x: jax.lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)]), SPLIT),
        shape(SIZE, SIZE),
    ),
}


def main():
    found = {}
    for name, (function, *arguments) in PROGRAMS.items():
        work = hlo.measure(hlo.parse(jax.jit(function).lower(*arguments).compile().as_text()))
        looped = any(each.in_loop for each in work.collectives)
        found[name] = [work.flops, work.wire, looped, len(work.unknown_loops)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
