"""Changes to a config, or to the slice, that make a phase fit: each is compiled before it is named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from egrpo_jax.common.errors import UserError
from egrpo_jax.parallel.mesh import make_mesh, sample_devices
from egrpo_jax.pipelines import lighter_options
from egrpo_jax.planning.cost import PhaseCost, kept_beside, phase_cost
from egrpo_jax.planning.devices import larger, slice_devices
from egrpo_jax.planning.phases import named_arguments, sketch_job
from egrpo_jax.rl.deal import default_slots
from egrpo_jax.rl.plan import AnchorPlan
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import Job

ENOUGH = 2
"""Changes that fit, after which no others are tried."""


class Change(NamedTuple):
    """A change, as one would type it, with the config and the devices that it gives."""

    text: str
    config: TrainConfig
    devices: Sequence[jax.Device]


class Trial(NamedTuple):
    """A change, the bytes of one device that the phase needs with it, and whether these fit.

    `is_compiled` is False where arguments and what stays beside them do not fit by themselves: that is arithmetic.
    """

    text: str
    needed: float
    fits: bool
    is_compiled: bool


def try_changes(job: Job, mesh: Mesh, cost: PhaseCost, topology: str | None) -> Iterator[Trial]:
    """Compiles a phase that does not fit with one change after another, until `ENOUGH` of them make it fit."""
    fitting = 0
    for change in changes(job, mesh, cost.compiled.phase, topology):
        trial = _try(change, cost)
        fitting += trial.fits
        yield trial
        if fitting == ENOUGH:
            return


def _try(change: Change, cost: PhaseCost) -> Trial:
    mesh, phase = make_mesh(change.config.mesh, change.devices), cost.compiled.phase
    with jax.set_mesh(mesh):
        job = sketch_job(change.config)
        held = sum((named_arguments(job, mesh, phase) | kept_beside(job, mesh, phase)).values())
        if cost.capacity is not None and held > cost.capacity:
            return Trial(change.text, held, fits=False, is_compiled=False)
        found = phase_cost(job, mesh, phase)
    return Trial(change.text, found.needed, found.fits, is_compiled=True)


def changes(job: Job, mesh: Mesh, phase: str, topology: str | None) -> Iterator[Change]:
    """Changes that take less memory in a phase, those that cost least first."""
    here = list(mesh.devices.flat)
    for keys in (*_general(job, mesh, phase), *lighter_options(job.config.model)):
        if any(_is_lighter(_value(job.config, key), value) for key, value in keys.items()):
            yield Change(_text(keys), _replaced(job.config, keys), here)
    if topology is not None:
        try:
            twice = larger(topology)
            devices = slice_devices(twice)
        except UserError:  # there is no larger one
            return
        filled = {} if -1 in dataclasses.astuple(job.config.mesh) else {"mesh.fsdp": -1}
        yield Change(f"--topology={twice} {_text(filled)}".strip(), _replaced(job.config, filled), devices)


def _general(job: Job, mesh: Mesh, phase: str) -> Iterator[dict[str, Any]]:
    """Keys and values that any model has."""
    if phase == "update":
        yield {"learner.micro_batch": 1}
    if phase == "rollout" and isinstance(job.plan, AnchorPlan):
        slots = job.config.tails_per_device
        slots = slots or default_slots(job.plan, job.rollouts_at_once, sample_devices(mesh))
        yield {"tails_per_device": max(1, slots // 2)}
    if "scorers" in kept_beside(job, mesh, phase):
        yield {"scorers.offload": True}
    yield {"optim.offload": True}
    yield {"optim.first_moment_dtype": "bfloat16"}
    if mesh.shape["data"] > 1:
        yield {"mesh.data": 1, "mesh.fsdp": -1}


def _is_lighter(now: Any, value: Any) -> bool:
    """Whether `value` would be a change for the less."""
    if type(now) is int:
        return bool(value < now)
    return now is None if dataclasses.is_dataclass(value) else now != value


def _text(keys: dict[str, Any]) -> str:
    shown = lambda value: f"{type(value).__name__}()" if dataclasses.is_dataclass(value) else value
    return " ".join(f"--config.{key}={shown(value)}" for key, value in keys.items())


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _replaced(config: Any, keys: dict[str, Any]) -> Any:
    """`config`, a tree of dataclasses, with other values at `keys`."""
    for key, value in keys.items():
        first, _, rest = key.partition(".")
        config = dataclasses.replace(
            config, **{first: _replaced(getattr(config, first), {rest: value}) if rest else value}
        )
    return config
