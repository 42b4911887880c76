"""A scorer's network over many images: spread over the mesh, a few at a time on each device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from egrpo_jax.common.offload import on_device
from egrpo_jax.parallel.fsdp import Layout
from egrpo_jax.parallel.mesh import over_samples, sample_devices, spread
from egrpo_jax.parallel.rules import Rules

SCORER_RULES: Rules = ((r"/kernel$", PartitionSpec("fsdp", None)),)
"""Of every scorer's networks: matrices, which are nearly all of one, lie split as the flow model's do."""

Network = Callable[..., Any]
"""`(params, *inputs) -> outputs`, pure; inputs and outputs are pytrees of arrays with leading axis B, and a row of the
outputs depends on the same row of the inputs alone."""


class Batched:
    """A compiled network that takes any number of rows."""

    def __init__(self, network: Network, params: Any, batch: int, mesh: Mesh):
        """`batch` rows at once on a device; `params` lie on `mesh`, over which the rows are spread, or its hosts."""
        self._params, self._batch, self._devices = params, batch, sample_devices(mesh)
        layout = Layout.of(params)

        def one_after_another(params: Any, inputs: tuple[Any, ...]) -> Any:
            rows = jax.tree.leaves(inputs)[0].shape[0]
            parts = jax.tree.map(lambda x: x.reshape(-1, min(batch, rows), *x.shape[1:]), inputs)
            outputs = jax.lax.map(lambda part: network(layout.boxed(params), *part), parts)
            return jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), outputs)

        run = spread(one_after_another, (layout.specs, over_samples()), over_samples(), mesh)
        self._run = jax.jit(lambda params, inputs: run(on_device(params), inputs))

    def __call__(self, *inputs: Any) -> Any:
        """Outputs of all B rows of `inputs`."""
        rows = jax.tree.leaves(inputs)[0].shape[0]
        on_each = math.ceil(rows / self._devices)
        if on_each > self._batch:
            on_each = math.ceil(on_each / self._batch) * self._batch
        missing = on_each * self._devices - rows
        filled = jax.tree.map(lambda x: _fill(x, missing), inputs) if missing else inputs
        outputs = self._run(self._params, filled)
        return jax.tree.map(lambda x: x[:rows], outputs) if missing else outputs


def _fill(rows: chex.Array, missing: int) -> chex.Array:
    """`rows` with the last one repeated, so that every device has as many, in whole batches."""
    return jnp.concatenate([rows, jnp.repeat(rows[-1:], missing, axis=0)])
