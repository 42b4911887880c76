"""What the processes of one run know of rows, and what fails in one of them: `rows.py HOST:PORT PROCESSES PROCESS`."""

import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from egrpo_jax.common.errors import UserError
from egrpo_jax.parallel import hosts
from egrpo_jax.parallel.mesh import REPLICATED, MeshConfig, make_mesh, over_samples
from egrpo_jax.rewards.batched import Batched


def fails_on_the_second(images, prompts):
    """A reward whose machine is out of order."""
    del prompts
    if hosts.own_number() == 1 and hosts.several():
        raise OSError("no such model here")
    return images.mean((1, 2, 3))


class FailsLater:
    """`fails_on_the_second`, from its third call on."""

    def __init__(self):
        self.calls = 0

    def __call__(self, images, prompts):
        self.calls += 1
        return fails_on_the_second(images, prompts) if self.calls > 4 else images.mean((1, 2, 3))


def check_rows(mesh, own):
    """Every row is one process's, as local arrays; all that is placed in rows comes to all processes."""
    whole = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    rows, local = hosts.own_rows(jax.device_put(whole, NamedSharding(mesh, over_samples())))
    assert rows.tolist() == own
    assert len(own) == 0 or local.sharding.mesh == hosts.own_mesh(mesh)
    np.testing.assert_array_equal(np.asarray(local), whole[own])
    np.testing.assert_array_equal(hosts.total_rows(np.asarray(local), rows, 16), whole)
    assert hosts.total_rows(np.ones(len(own), bool), rows, 16).all()


def check_scorer(mesh):
    """A network of one process alone, over the rows of this one."""
    whole = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    rows, local = hosts.own_rows(jax.device_put(whole, NamedSharding(mesh, over_samples())))
    with hosts.alone(mesh) as own:
        params = {"scale": jax.device_put(jax.numpy.full((), 2.0), NamedSharding(own, REPLICATED))}
        network = Batched(lambda params, images: params["scale"] * images, params, 2, own)
        for chosen in (slice(None), slice(3)):
            np.testing.assert_array_equal(np.asarray(network(local[chosen])), 2 * whole[rows[chosen]])


def check_reading(mesh):
    """Each process reads its half of the rows, where they can be spread, and all of them otherwise."""
    read = []
    array = hosts.read_rows(range(16), lambda items: read.extend(items) or np.array(items, np.int32))
    assert read == list(half(hosts.own_number()))
    everywhere = hosts.on_all(np.arange(16, dtype=np.int32), NamedSharding(mesh, REPLICATED))
    assert bool((array == everywhere).all())
    assert hosts.read_rows(range(3), lambda items: np.array(items)).is_fully_replicated


def check_agreement():
    """What one process raises, all do."""
    second = hosts.own_number() == 1
    for told, error, expected in (
        (UserError, UserError("a line"), UserError),
        (ArithmeticUserError, ArithmeticUserError("a line"), ArithmeticUserError),
        (ArithmeticUserError, UserError("a line"), UserError),
        (UserError, ValueError("a line"), ValueError if second else hosts.ElsewhereError),
    ):
        with pytest.raises(expected, match=r"a line$") as found, hosts.agreed(told):
            raise_one(error if second else None)
        assert found.type is expected
    with hosts.agreed():
        pass
    assert hosts.largest(hosts.own_number() + 5) == 6


def raise_one(error):
    if error is not None:
        raise error


class ArithmeticUserError(UserError):
    """A special kind."""


def main(coordinator, processes, process):
    hosts.start(coordinator, int(processes), int(process))
    with hosts.together():
        number = hosts.own_number()
        with jax.set_mesh(make_mesh(MeshConfig(4, 2, 1))):
            mesh = jax.sharding.get_mesh()
            check_rows(mesh, list(half(number)))
            check_scorer(mesh)
            check_reading(mesh)
        for axes, own in (((2, 2, 2), half(number)), ((1, 1, 8), range(16) if number == 0 else ())):
            with jax.set_mesh(make_mesh(MeshConfig(*axes))):
                check_rows(jax.sharding.get_mesh(), list(own))
        check_agreement()


def half(number):
    return range(8 * number, 8 * number + 8)


if __name__ == "__main__":
    main(*sys.argv[1:])
