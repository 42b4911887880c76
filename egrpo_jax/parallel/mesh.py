"""The device mesh and how an iteration is spread over it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from egrpo_jax.common.errors import ConfigError, UserError, first_line
from egrpo_jax.common.ranges import Range, check

FSDP, TENSOR = "fsdp", "tensor"
SAMPLES = ("data", FSDP)
"""The axes over which samples are spread, together, so that no device repeats another's work: manual inside shard_map.
`tensor` stays automatic."""


Axis = Annotated[int, Range(1, 1_000_000, also=-1, why="-1 takes all devices that are left")]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The config section `mesh`: devices on each axis; -1 on one axis takes all that are left.

    Attributes:
      data: devices over which samples are spread, all with the same parameters.
      fsdp: devices over which samples are spread and parameters are sharded; these are gathered layer by layer.
      tensor: devices over which matrix products are split.
    """

    data: Axis = -1
    fsdp: Axis = 1
    tensor: Axis = 1

    def __post_init__(self) -> None:
        check(self)
        if dataclasses.astuple(self).count(-1) > 1:
            raise ConfigError("data", self.data, "-1 on one axis only")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices`, by default all that there are.

    Raises:
      ConfigError: if the axes do not multiply to the number of devices.
      UserError: JAX finds no devices, or is told to compute in float64.
    """
    count = _count_devices() if devices is None else len(devices)
    sizes = list(dataclasses.astuple(config))
    if -1 in sizes:
        fill = sizes.index(-1)
        sizes[fill] = 1
        used = sizes[0] * sizes[1] * sizes[2]
        sizes[fill] = count // used
    if sizes[0] * sizes[1] * sizes[2] != count:
        where = "here" if devices is None else "to plan for"
        raise ConfigError("mesh", dataclasses.astuple(config), f"axes that multiply to the {count} devices {where}")
    # As `jax.make_mesh`, which lets an axis be a part of a slice's side (8 of 4 x 4 chips) on v5e alone.
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, (*SAMPLES, TENSOR), axis_types=(AxisType.Auto,) * 3)


def _count_devices() -> int:
    """The number of devices, where the environment lets JAX have any. Raises UserError."""
    if jax.dtypes.canonicalize_dtype("float64") == "float64":
        raise UserError("JAX_ENABLE_X64: found it set, expected it unset: all is computed in float32 or bfloat16")
    try:
        return jax.device_count()
    except (RuntimeError, AssertionError) as error:  # an AssertionError, without a word, where a plugin is missing
        chosen = {name: os.environ[name] for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES") if name in os.environ}
        raise UserError(
            f"JAX finds no devices with {chosen or 'its defaults'} ({first_line(error) or 'no such platform here'}); "
            "expected JAX_PLATFORMS=cpu, a platform whose plugin is installed, or neither set"
        ) from error


def sample_devices(mesh: Mesh | None = None) -> int:
    """The number of devices, or teams of devices along `tensor`, that samples are spread over; by default of the mesh
    that is set."""
    shape = (mesh or jax.sharding.get_abstract_mesh()).shape
    return math.prod(shape[axis] for axis in SAMPLES)


def over_samples(axis: int = 0) -> PartitionSpec:
    """Spread over all devices that share the samples, along `axis`."""
    return PartitionSpec(*(None,) * axis, SAMPLES)


REPLICATED = PartitionSpec()
EXACT = {"xla_allow_excess_precision": False}
"""XLA's option for bfloat16 that is rounded where the model says so. Otherwise XLA skips roundings where operations
happen to be fused, and two passes over the same states differ by more than the clip range of the policy ratio."""


def spread(function: Callable[..., Any], in_specs: Any, out_specs: Any, mesh: Mesh | None = None) -> Callable[..., Any]:
    """`shard_map(function)`, manual over `SAMPLES`, on `mesh`, by default that which `jax.set_mesh` has set."""
    shape = (mesh or jax.sharding.get_abstract_mesh()).shape
    # Where nothing is split over `tensor`, XLA has nothing left to partition, which is half of compiling.
    manual = {*SAMPLES} if shape[TENSOR] > 1 else {*SAMPLES, TENSOR}
    # check_vma would sum the gradients of replicated parameters over devices in every micro-batch; `fsdp.Layout` does
    # so once, after accumulation.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=manual, check_vma=False
    )


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit(function, **options)`, `EXACT`."""
    return jax.jit(function, compiler_options=EXACT, **options)
