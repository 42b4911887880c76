"""Checkpoints, which a kill at any moment leaves whole.

A checkpoint is an Orbax directory `<iteration>/` with the items `state` (the arrays) and `meta` (JSON). Orbax calls the
iteration a step. `meta` also keeps a fingerprint of the state: the path, dtype, shape and checksum of every array. It
tells the two ways in which a restore can fail apart (another model: the paths, dtypes or shapes differ; damage:
anything else) and finds the damage that no file format notices. A checksum of `meta` itself is in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from egrpo_jax.common.errors import UserError, first_line, last_cause
from egrpo_jax.parallel import hosts
from egrpo_jax.run.finishing import finishing

PyTree = Any
_Fingerprint = dict[str, list[Any]]

# What Orbax and TensorStore raise for missing, truncated and garbled files, besides a bare Exception.
_DAMAGE = (ValueError, KeyError, FileNotFoundError, NotADirectoryError)
# Orbax logs, with its traceback, every error of the thread that writes, and raises it again when that is waited for;
# and that a damaged checkpoint's metadata cannot be read, which we tell.
_TOLD = re.compile(r"_SignalingThread\.run\(\) raised|Metadata file")
logging.get_absl_logger().addFilter(lambda record: not _TOLD.search(record.getMessage()))
_NOT_DAMAGE = re.compile("PERMISSION_DENIED|UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|CANCELLED")


class _DamagedError(UserError):
    """A checkpoint is damaged."""


class Checkpoints:
    """The checkpoints of one run, in one directory. In a multi-host run every process makes the same calls.

    Attributes:
      directory: where they lie.
      damaged: the damaged checkpoints that `restore_latest` found, where they now lie.
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int = 2, read_only: bool = False):
        """Opens or makes `directory` and removes what a killed save left; `keep` >= 2 of the newest are kept.

        `read_only`: changes nothing there, not even what is damaged or half written: the run may be under way.
        """
        if keep < 2:
            raise ValueError(f"keep must be at least 2, so that one damaged checkpoint loses little; found {keep}")
        self.damaged: list[Path] = []
        self.directory, self._read_only = Path(directory).absolute(), read_only
        # Not Orbax's own `read_only`, of which it warns three times.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=not read_only, cleanup_tmp_directories=not read_only
        )
        try:
            if not read_only:
                self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
            self._reader = self._manager if not hosts.several() else _own_reader(self.directory)
        except OSError as error:
            raise UserError(f"cannot write checkpoints in {self.directory}: {error.strerror}") from error

    def save(self, iteration: int, state: PyTree, meta: Mapping[str, Any]) -> None:
        """Copies `state` and writes it in the background; returns at once if `iteration` is already the newest.

        Args:
          iteration: at least 0, larger than that of every earlier checkpoint.
          state: arrays and numbers; PRNG keys as `jax.random.key_data`.
          meta: anything JSON can hold.

        Raises:
          UserError: if the save before this one could not be written, e.g. on a full disk, or a number in `state` is
            not finite: nothing could go on from there.
        """
        if iteration == self._manager.latest_step():
            return
        self.wait()
        fingerprint, broken = _survey(state)
        if broken is not None:
            raise UserError(
                f"{self.directory}: no checkpoint of iteration {iteration} is written: {broken} is not finite"
            )
        record = json.loads(json.dumps({"fingerprint": fingerprint, "meta": dict(meta)}))
        record["crc32"] = _crc32(record)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(record))
        with self._written():
            self._manager.save(iteration, args=items, force=True)

    def wait(self) -> None:
        """Returns once everything saved is on disk; raises UserError if it could not be written."""
        with self._written():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and releases the threads. Raises UserError if the last save could not be written."""
        with finishing(self._manager.close):
            if self._reader is not self._manager:
                self._reader.close()
            self.wait()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
            cause = getattr(error, "strerror", None) or last_cause(error)
            raise UserError(f"cannot write a checkpoint in {self.directory}: {cause}") from error

    def restore_latest(self, abstract: PyTree, partial: bool = False) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest checkpoint that can be read, as (iteration, state, meta), or None if there is none at all.

        Newer ones that are damaged are moved to `damaged-<iteration>-<n>`, once an older one has proved to be good;
        they stay where all is only read.

        Args:
          abstract: the state's tree, of `jax.ShapeDtypeStruct` or of arrays. The result has its shardings; a struct
            without one goes to the first device.
          partial: `abstract` may lack some of the state's leaves, and only those that it has are read.

        Raises:
          UserError: if a checkpoint is of another model (paths, dtypes or shapes differ), or all of them are damaged.
        """
        target = jax.tree.map(_placed, abstract)
        failures: dict[int, Exception] = {}
        for iteration in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, meta = self._restore(iteration, target, partial)
            except _DamagedError as error:
                failures[iteration] = error
                continue
            self._set_aside(failures, iteration)
            return iteration, state, meta
        if failures:
            iterations, cause = ", ".join(map(str, failures)), first_line(next(iter(failures.values())))
            raise UserError(
                f"every checkpoint in {self.directory} (iterations {iterations}) is damaged ({cause}); "
                "put a good copy there, or start over in another workdir"
            )
        return None

    def _restore(self, iteration: int, target: PyTree, partial: bool) -> tuple[PyTree, dict[str, Any]]:
        with hosts.agreed(_DamagedError), _damage_told():
            saved, state, meta = self._read(iteration, target, partial)
        found, _ = _survey(state)
        for path, entry in saved.items():
            if entry != found[path]:
                raise _DamagedError(f"checksum of {path} differs")
        return state, meta

    def _read(self, iteration: int, target: PyTree, partial: bool) -> tuple[_Fingerprint, PyTree, dict[str, Any]]:
        """The fingerprint that was saved, the state, of which a process reads its own part, and `meta`."""
        record = self._reader.restore(iteration, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        if not isinstance(record, dict) or record.pop("crc32", None) != _crc32(record):
            raise ValueError("checksum of meta differs")
        saved, wanted = record["fingerprint"], _layout(target)
        if partial:
            saved = {path: entry for path, entry in saved.items() if path in wanted}
        _check_same_model(self.directory / str(iteration), saved, wanted)
        restore = _partial_restore(target) if partial else ocp.args.StandardRestore(target)
        state = self._reader.restore(iteration, args=ocp.args.Composite(state=restore)).state
        return saved, state, record["meta"]

    def _set_aside(self, failures: Mapping[int, Exception], restored: int) -> None:
        for iteration, error in failures.items():
            found = f"warning: checkpoint {iteration} is damaged ({first_line(error)})"
            if self._read_only:
                print(f"{found}; iteration {restored} is read", file=sys.stderr)
                continue
            number = sum(1 for _ in self.directory.glob(f"damaged-{iteration}-*"))
            aside = self.directory / f"damaged-{iteration}-{number}"
            hosts.meet()  # every process has counted
            if hosts.leads():
                (self.directory / str(iteration)).rename(aside)
            self.damaged.append(aside)
            print(f"{found}; moved to {aside}, continuing from iteration {restored}", file=sys.stderr)
        if self.damaged:
            hosts.meet()
            self._manager.reload()


def _partial_restore(target: PyTree) -> ocp.args.CheckpointArgs:
    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(item=target, restore_args=restore_args, partial_restore=True)


def _own_reader(directory: Path) -> ocp.CheckpointManager:
    """A manager that reads in this process alone: the usual one waits for processes whose part could not be read."""
    own = hosts.own_number()
    alone = ocp.options.MultiprocessingOptions(own, {own}, f"reader {own}")
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
    return ocp.CheckpointManager(directory, options=options)


@contextlib.contextmanager
def _damage_told() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_damage(error):
            raise
        raise _DamagedError(first_line(error)) from error


def _is_damage(error: Exception) -> bool:
    """Whether `error` means bad files. TensorStore's failed array reads reach us as a bare `Exception`."""
    if not isinstance(error, _DAMAGE) and type(error) is not Exception:
        return False
    return not _NOT_DAMAGE.search(f"{error} {error.__cause__}")


def _placed(leaf: Any) -> Any:
    """An abstract `leaf` with a sharding that is sure to exist on this machine; checks that it divides the shape."""
    if isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is None:
        return leaf.update(sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    if isinstance(leaf, jax.ShapeDtypeStruct | jax.Array):
        leaf.sharding.shard_shape(leaf.shape)
    return leaf


def _crc32(record: Any) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _layout(state: PyTree) -> dict[str, list[Any]]:
    """{path: [dtype, shape]} of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {_name(path): [str(jnp.result_type(leaf)), list(np.shape(leaf))] for path, leaf in leaves}


def _survey(state: PyTree) -> tuple[_Fingerprint, str | None]:
    """{path: [dtype, shape, checksum]}, the same for every sharding; and the first path with a nan or an infinity."""
    layout = _layout(state)
    checksums, finite = jax.device_get(_inspect(jax.tree.leaves(state)))
    fingerprint = {path: [*layout[path], int(value)] for path, value in zip(layout, checksums, strict=True)}
    broken = (path for path, is_finite in zip(layout, finite, strict=True) if not is_finite)
    return fingerprint, next(broken, None)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


@jax.jit
def _inspect(leaves: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Of each array the sum modulo 2^32 of its bits, read as unsigned integers, and whether it is finite.

    Any order of summing gives that same sum.
    """

    def checksum(leaf: jax.Array) -> jax.Array:
        words = leaf.view(f"uint{8 * leaf.dtype.itemsize}")
        return jnp.sum(words, dtype=jnp.uint32)

    arrays = [jnp.asarray(leaf) for leaf in leaves]
    return [checksum(each) for each in arrays], [jnp.isfinite(each).all() for each in arrays]


def _check_same_model(path: Path, saved: Mapping[str, list[Any]], wanted: Mapping[str, list[Any]]) -> None:
    for name in sorted({*saved, *wanted}):
        found, expected = saved.get(name, [None, None])[:2], wanted.get(name, [None, None])
        if found != expected:
            found_text, expected_text = (
                f"{entry[0]}{entry[1]}" if entry[0] else "nothing" for entry in (found, expected)
            )
            raise UserError(
                f"{path} is a checkpoint of another model: {name} is {found_text} there, {expected_text} here; "
                "use the config it was made with, or another workdir"
            )
