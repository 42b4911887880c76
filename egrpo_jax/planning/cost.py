"""The cost of a run: its operations, by arithmetic, and of each phase the memory and the work, as compiled."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from jax.sharding import Mesh

from egrpo_jax.parallel.rules import with_shardings
from egrpo_jax.planning.devices import capacity
from egrpo_jax.planning.phases import (
    Compiled,
    abstract_transitions,
    bytes_on_device,
    compile_phase,
)
from egrpo_jax.rewards.sizes import scorer_params
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import Job
from egrpo_jax.training.state import abstract_state


class Passes(NamedTuple):
    """Passes of the model in an iteration, over all devices, without those that devices repeat, and their operations.

    Attributes:
      screening: forward passes that choose among prompts, before the rollout; they keep what these share.
      shared, own: forward passes of a rollout before its samples go their own ways, and after.
      training: forward and backward passes.
      scoring: forward passes for the old log-probabilities of several updates.
      images: decoded.
      forward_flops, training_flops, decode_flops: operations of one of each, see `Pipeline`; None if unknown.
    """

    screening: int
    shared: int
    own: int
    training: int
    scoring: int
    images: int
    forward_flops: float | None
    training_flops: float | None
    decode_flops: float | None

    def flops(self, phase: str) -> float | None:
        """Operations of all calls of a phase; None where they are not known by arithmetic."""
        if phase == "decode":
            return None if self.decode_flops is None else self.images * self.decode_flops
        if self.forward_flops is None or self.training_flops is None:
            return None
        if phase == "rollout":
            return (self.shared + self.own) * self.forward_flops
        return self.training * self.training_flops + self.scoring * self.forward_flops


def count_passes(job: Job) -> Passes:
    """The passes of an iteration of `job`."""
    plan, prompts, learner = job.plan, job.config.prompts_per_iteration, job.config.learner
    states, screens = prompts * plan.training_passes_in(learner.minibatches), plan.candidates > 1
    return Passes(
        screening=job.rollouts * plan.shared_passes * screens,
        shared=job.rollouts * plan.shared_passes * (not screens),
        own=job.rollouts * plan.own_passes,
        training=states * learner.epochs,
        scoring=states * learner.scorings(len(plan.branches)),
        images=prompts * plan.images,
        forward_flops=job.pipeline.forward_flops,
        training_flops=job.pipeline.training_flops,
        decode_flops=job.pipeline.decode_flops,
    )


@dataclasses.dataclass(frozen=True)
class PhaseCost:
    """A phase as compiled, in a run.

    Attributes:
      compiled: by itself.
      beside: bytes of one device that stay in memory meanwhile though the phase does not use them, by what they are.
      capacity: bytes that a device has; None if unknown.
      calls: in an iteration.
      expected: operations of one call on all devices, by arithmetic; None if unknown.
      devices: how many there are.
    """

    compiled: Compiled
    beside: dict[str, float]
    capacity: float | None
    calls: int
    expected: float | None
    devices: int

    @property
    def needed(self) -> float:
        """Bytes of one device."""
        own = self.compiled.memory.total if self.compiled.memory else self.compiled.refused or 0.0
        return own + sum(self.beside.values())

    @property
    def fits(self) -> bool:
        """True if the phase compiles and there is room for all that stays beside it."""
        return self.compiled.memory is not None and (self.capacity is None or self.needed <= self.capacity)

    @property
    def repeated(self) -> float | None:
        """Operations of a device by those of all over the number of devices: 1 where none repeats another's work."""
        work = self.compiled.work
        return None if work is None or self.expected is None else work.flops * self.devices / self.expected

    @property
    def largest(self) -> tuple[str, float]:
        """The largest part of `needed`."""
        memory = self.compiled.memory
        parts = self.compiled.arguments | self.beside
        if memory is not None:
            parts = parts | {"temporaries": memory.temporaries, "outputs": memory.outputs}
        else:
            parts = parts | {"temporaries": self.needed - sum(parts.values())}
        return max(parts.items(), key=lambda part: part[1])


def phase_cost(job: Job, mesh: Mesh, phase: str) -> PhaseCost:
    """The cost of a phase of `job`, compiled for `mesh`, which is set."""
    compiled = compile_phase(job, mesh, phase)
    calls = 1 if phase == "update" else job.rollouts // job.rollouts_at_once
    total = count_passes(job).flops(phase)
    return PhaseCost(
        compiled=compiled,
        beside=kept_beside(job, mesh, phase) | _unused(compiled),
        capacity=capacity(mesh.devices.flat[0]),
        calls=calls,
        expected=None if total is None else total / calls,
        devices=mesh.size,
    )


def _unused(compiled: Compiled) -> dict[str, float]:
    """Arguments that the compiler has left out, since the phase does not read them, yet they are there."""
    unused = 0.0 if compiled.memory is None else sum(compiled.arguments.values()) - compiled.memory.arguments
    return {"weights not read": unused} if unused > 0.01 * sum(compiled.arguments.values()) else {}


def kept_beside(job: Job, mesh: Mesh, phase: str) -> dict[str, float]:
    """Bytes of one device that are in memory during a phase and are none of its arguments, by what they are."""
    parts = {
        "text encoders": bytes_on_device(with_shardings(mesh, job.pipeline.rules, dict(job.pipeline.encoder_params))),
        "scorers": 0.0 if job.config.scorers.offload else bytes_on_device(_scorers(job.config, mesh)),
    }
    if phase != "update":
        state = abstract_state(job, mesh)
        steps = bytes_on_device(abstract_transitions(job, mesh))
        rollouts = job.rollouts // job.rollouts_at_once
        # Those of the rollout at hand are its output; while it is decoded they are kept.
        kept = steps if phase == "decode" else steps * (rollouts - 1) / rollouts
        copies = bytes_on_device((state.ema, state.reference, state.trailing))
        parts |= {"moments": bytes_on_device(state.opt_state), "averages and copies": copies, "steps": kept}
    return {name: value for name, value in parts.items() if value}


def _scorers(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """Parameters of each reward, as shapes, None where unknown; those on other machines have none here."""
    names = config.rewards.train + config.rewards.heldout
    here = [name for name in names if name not in config.scorers.remote]
    return {name: scorer_params(name, config.scorers.dtype, mesh) for name in here}


def uncounted_scorers(config: TrainConfig, mesh: Mesh) -> list[str]:
    """The rewards whose parameters are of unknown size."""
    return [name for name, params in _scorers(config, mesh).items() if params is None]
