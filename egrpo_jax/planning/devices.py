"""Devices to compile for: those of a TPU slice that need not be there, or those at hand."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from egrpo_jax.common.errors import UserError, first_line

GIB = 2**30
_USABLE = {"TPU v4": 30.75, "TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25, "TPU7x": 94.75}
"""GiB of a device that a program may use, as the compiler says when one does not fit, by the kind in JAX. A chip of
TPU7x is two devices; one of v4 is one device (megacore)."""
_EXAMPLES = "v4:2x2x1, v5e:1x1, v5e:4x4, v5p:2x2x2, v6e:2x4 or tpu7x:2x2x1"
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: libtpu otherwise asks the machine it is not on
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def slice_devices(topology: str) -> list[jax.Device]:
    """The devices of a TPU slice such as "v5p:2x2x2": compilers of JAX take them, nothing runs on them.

    Raises:
      UserError: there is no such slice, or libtpu is not installed.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # of the host, which needs no TPU
    how: dict[str, Any] = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    if re.search(r":1(x1)*$", topology):  # a chip by itself, where hosts have several
        how["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **how)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology: found {topology!r}, expected a slice, as {_EXAMPLES} ({_cause(error)})") from None
    except RuntimeError as error:
        if "not installed" not in str(error):
            raise
        raise UserError("--topology: found no compiler for TPUs, expected pip install 'egrpo_jax[tpu]'") from None
    return list(described.devices)


def _cause(error: Exception) -> str:
    return first_line(error).removeprefix("INVALID_ARGUMENT: ")


def devices_at_hand(count: int | None) -> Sequence[jax.Device]:
    """The first `count` devices here; of CPUs there are as many as asked for. By default all.

    Raises:
      UserError: there are fewer.
    """
    if count is not None:
        with contextlib.suppress(RuntimeError):  # JAX has devices already: those are what there is
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if count is not None and len(devices) < count:
        found = f"{len(devices)} of {devices[0].device_kind}"
        raise UserError(f"--devices: found {count}, expected as many as there are here, {found}, or JAX_PLATFORMS=cpu")
    return devices[:count]


def capacity(device: jax.Device) -> float | None:
    """Bytes of memory that a program may use on a device; None where that is not known, as of a CPU."""
    fitting = [kind for kind in _USABLE if device.device_kind.startswith(kind)]
    if fitting:
        return _USABLE[max(fitting, key=len)] * GIB
    if device.platform == "cpu":
        return None
    return (device.memory_stats() or {}).get("bytes_limit")


def larger(topology: str) -> str:
    """The slice of twice as many chips: the last of its shortest axes is doubled."""
    kind, sizes = topology.split(":")
    axes = [int(size) for size in re.findall(r"\d+", sizes)]
    last = max(index for index, size in enumerate(axes) if size == min(axes))
    axes[last] *= 2
    return f"{kind}:{'x'.join(map(str, axes))}"
