"""The processes of one run, each with devices of its own: how they start, meet, share what they know, and end.

All of them run the same program on arrays that span all devices, and every compiled call is one call of all. What only
one of them does, or each does for its own rows (files, rewards), may fail on one alone: it stands in `agreed`, so that
all go on or all end. A process that is alone pays for none of this.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import socket
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import multihost

from egrpo_jax.common.errors import UserError, first_line
from egrpo_jax.parallel.mesh import REPLICATED, over_samples, sample_devices

T = TypeVar("T")

START_TIMEOUT = 300
"""Seconds in which all processes must have started."""
MEETING_TIMEOUT = 30
"""Seconds that a process which ends waits for the others to end as well."""
_TEXT = 1000
"""Bytes of what went wrong that other processes get to know."""
_TPU_NEIGHBOURS = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")


class SharedError(RuntimeError):
    """An error that all processes raise alike, at the same place."""


class ElsewhereError(SharedError):
    """Another process has failed."""


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the other processes, before any device is used; without arguments, where the environment tells of others.

    Raises:
      UserError: some arguments are missing or wrong, or the processes cannot be joined.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    explicit = _check(given)
    if not explicit and not _has_neighbours(os.environ):
        return
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    late = threading.Timer(START_TIMEOUT, _give_up, [coordinator])  # JAX's own timeout ends with SIGABRT
    late.start()
    options: dict[str, Any] = {"coordinator_address": coordinator, "initialization_timeout": START_TIMEOUT + 60}
    if explicit:
        options |= {"num_processes": num_processes, "process_id": process_id, "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(**options)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"at {coordinator}" if explicit else "that the environment tells of"
        raise UserError(f"cannot join the processes {where}: {first_line(error)}") from error
    finally:
        late.cancel()


def _check(given: Mapping[str, Any]) -> bool:
    """Whether all of the flags are given; raises UserError if only some are, or one is wrong."""
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return False
    if missing:
        raise UserError(f"expected --{missing[0]} too: all of {', '.join(f'--{name}' for name in given)}, or none")
    coordinator, count, number = given.values()
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator: found {coordinator!r}, expected HOST:PORT of the process 0")
    if not 0 <= number < count:
        raise UserError(f"--process_id: found {number}, expected 0 to {count - 1}, as there are {count} processes")
    if number == 0:
        _check_free(int(port))
    return True


def _check_free(port: int) -> None:
    """Raises UserError unless the process 0 can listen at `port`: JAX may crash then."""
    dual = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual
        ).close()
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise UserError(f"--coordinator: cannot listen at port {port}: {why}; choose a free one") from error


def _has_neighbours(environment: Mapping[str, str]) -> bool:
    """Whether SLURM, Open MPI, GKE or a Cloud TPU VM started this process as one of several."""
    counts = [environment.get(name, "1") for name in _COUNTS]
    if any(count.isdecimal() and int(count) > 1 for count in counts):
        return True
    names = next((environment[name] for name in _TPU_NEIGHBOURS if name in environment), None)
    if names is not None:
        return "," in names
    # JAX sets this variable where there is no TPU. A TPU VM's metadata, which JAX then asks, tell of the others.
    on_tpu = "TPU_SKIP_MDS_QUERY" not in environment and importlib.util.find_spec("libtpu") is not None
    return on_tpu and "tpu" in environment.get("JAX_PLATFORMS", "tpu")


def _give_up(coordinator: str | None) -> None:
    where = coordinator or "where the environment says"
    line = f"error: not all processes met {where} within {START_TIMEOUT} s; see that all were started and reach it"
    print(line, file=sys.stderr, flush=True)
    os._exit(1)


def several() -> bool:
    """Tells if there are other processes; asks for no device, which may not be there, unless they were joined."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def own_number() -> int:
    """The number of this process, from 0."""
    return jax.process_index() if several() else 0


def leads() -> bool:
    """Tells if this is the one process that writes files and speaks to people."""
    return own_number() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that all processes leave together. One that fails alone ends by itself, and JAX ends the others."""
    try:
        yield
    except BaseException as error:
        if several() and not (_is_shared(error) and _meet_to_end()):
            atexit.register(_exit_now, _exit_code(error))
        raise
    if several():
        _meet_to_end()


def _meet_to_end() -> bool:
    """Waits for the others to end too, and tells whether they came."""
    try:
        multihost.sync_global_processes("end", timeout=MEETING_TIMEOUT)
    except Exception:  # of JAX's runtime, for a deadline or a lost connection
        return False
    return True


def _exit_now(code: int) -> None:
    """Ends the process: JAX would wait for the others at its end, and abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, UserError) else 1


def _is_shared(error: BaseException) -> bool:
    return isinstance(error, UserError | SharedError) or hasattr(error, "agreed")


@contextlib.contextmanager
def leader_speaks() -> Iterator[None]:
    """A block in which what processes other than the leader print goes nowhere."""
    if leads():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def agreed(told: type[UserError] = UserError) -> Iterator[None]:
    """A block at whose end all processes learn if one of them raised in it, and raise as well.

    In it a process does only what is its own, nothing that all must do together. `told` is the most special kind of
    UserError that all are to raise. A process that is failing alone already asks nobody.

    Raises:
      ElsewhereError: what another process raised was no UserError.
    """
    failing = sys.exception()
    if not several() or not (failing is None or _is_shared(failing)):
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    kinds = [failure is not None, isinstance(failure, UserError), isinstance(failure, told)]
    found = _first_failure(sum(kinds), _one_line(failure))
    if failure is not None:
        failure.agreed = True  # type: ignore[attr-defined]
        raise failure
    if found is not None:
        process, kind, text = found
        if kind > 1:
            raise (told if kind == 3 else UserError)(text)
        raise ElsewhereError(f"process {process} has failed, and tells more: {text}")


def _one_line(error: Exception | None) -> str:
    named = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return "" if error is None else named + " ".join(str(error).split())


def _first_failure(kind: int, text: str) -> tuple[int, int, str] | None:
    """Process, kind and text of the first process whose kind is not 0."""
    encoded = text.encode()[:_TEXT]
    record = np.zeros(1 + _TEXT, np.uint8)
    record[0], record[1 : 1 + len(encoded)] = kind, list(encoded)
    records = _by_process(record)
    failed = np.flatnonzero(records[:, 0]).tolist()
    if not failed:
        return None
    found = records[failed[0]]
    return failed[0], int(found[0]), bytes(found[1:]).rstrip(b"\0").decode(errors="ignore")


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    return int(_by_process(np.array(number, np.int32)).max()) if several() else number


def meet() -> None:
    """Waits until all processes are here."""
    largest(0)


def require_same(text: str, what: str) -> None:
    """Raises UserError, on all processes, unless all have the same `text`, which is `what`."""
    if several() and len(set(_by_process(np.array(zlib.crc32(text.encode()), np.uint32)).tolist())) > 1:
        raise UserError(f"the processes have not the same {what}; start all with the same command")


def _by_process(array: np.ndarray) -> np.ndarray:
    """The arrays of all processes, `[processes, ...]`."""
    rows = np.zeros((jax.process_count(), *array.shape), array.dtype)
    rows[own_number()] = array
    return total(rows)


def total(tree: T) -> T:
    """The sum of the processes' pytrees of NumPy arrays of the same shapes; of bool, whether any is true."""
    if not several():
        return tree
    mesh, add = _adder()
    split = NamedSharding(mesh, PartitionSpec("process"))
    with jax.set_mesh(mesh):
        rows = jax.tree.map(lambda x: jax.make_array_from_process_local_data(split, x[None]), tree)
        return jax.tree.map(np.array, add(rows))


def placed(tree: T, rows: np.ndarray, count: int) -> T:
    """NumPy arrays `[count, ...]`, 0 but for `rows`, which are those of `tree`."""

    def place(values: np.ndarray) -> np.ndarray:
        whole = np.zeros((count, *values.shape[1:]), values.dtype)
        whole[rows] = values
        return whole

    return jax.tree.map(place, tree)


def total_rows(tree: T, rows: np.ndarray, count: int) -> T:
    """The NumPy arrays `[count, ...]` of which each process has some `rows`, those of its `tree`."""
    return total(placed(tree, rows, count)) if several() else tree


@functools.cache
def _adder() -> tuple[Mesh, Callable[[Any], Any]]:
    """A mesh of processes and their devices, and the sum over processes, known to all of these."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    shape = (jax.process_count(), -1)
    mesh = Mesh(np.array(devices).reshape(shape), ("process", "device"), axis_types=(AxisType.Auto,) * 2)

    def add(rows: Any) -> Any:
        return jax.tree.map(lambda x: x.any(0) if x.dtype == bool else x.sum(0, dtype=x.dtype), rows)

    return mesh, jax.jit(add, out_shardings=NamedSharding(mesh, REPLICATED))


def own_mesh(mesh: Mesh) -> Mesh:
    """The part of `mesh` on which this process has rows of its own: see `own_rows`."""
    if not several():
        return mesh
    first = [device for device in mesh.devices[..., 0].flat if device.process_index == own_number()]
    devices = np.array(first or jax.local_devices()).reshape(-1, 1, 1)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


@contextlib.contextmanager
def alone(mesh: Mesh) -> Iterator[Mesh]:
    """A block in which each process computes by itself, on `own_mesh(mesh)`, which is set."""
    own = own_mesh(mesh)
    with jax.set_mesh(own) if several() else contextlib.nullcontext():
        yield own


def own_rows(array: jax.Array) -> tuple[np.ndarray, jax.Array]:
    """The rows that this process sees to, and an array of them alone: those that its devices hold, of `array` spread
    over the samples of the mesh that is set. Every row is one process's."""
    if not several():
        return np.arange(len(array)), array
    mesh = jax.sharding.get_mesh()
    spread = jax.device_put(array, NamedSharding(mesh, over_samples()))
    shards = [shard for shard in spread.addressable_shards if shard.replica_id == 0]
    shards.sort(key=lambda shard: shard.index[0].start or 0)
    if not shards:
        return np.arange(0), jax.numpy.zeros((0, *array.shape[1:]), array.dtype)
    rows = np.concatenate([np.arange(len(array))[shard.index[0]] for shard in shards])
    where, parts = NamedSharding(own_mesh(mesh), over_samples()), [shard.data for shard in shards]
    return rows, jax.make_array_from_single_device_arrays((len(rows), *array.shape[1:]), where, parts)


def read_rows(items: Sequence[Any], read: Callable[[Sequence[Any]], T]) -> T:
    """`read(items)`, a pytree of NumPy arrays with leading axis B; each process reads what its own devices need, and
    the arrays are spread over the samples of the mesh that is set, if these divide B."""
    if not several():
        return read(items)
    mesh = jax.sharding.get_mesh()
    count = len(items)
    divides = count % sample_devices(mesh) == 0
    where = NamedSharding(mesh, over_samples() if divides else REPLICATED)
    needed = {_range(index, count) for index in where.addressable_devices_indices_map((count,)).values()}
    first, last = min(needed)[0], max(needed)[1]

    def laid_out(rows: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            start, stop = _range(index, count)
            return rows[start - first : stop - first]

        return jax.make_array_from_callback((count, *rows.shape[1:]), where, part)

    return jax.tree.map(laid_out, read(items[first:last]))


def _range(index: tuple[slice, ...] | None, count: int) -> tuple[int, int]:
    """The first row of an index, and the one after the last."""
    return (index[0] if index else slice(None)).indices(count)[:2]


def on_all(array: Any, where: NamedSharding) -> jax.Array:
    """`array`, which all processes have alike, laid out as `where`; one that lies there already is not copied."""
    if not several() or not getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, where)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])
