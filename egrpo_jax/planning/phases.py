"""The phases of a run, compiled from shapes: the memory and the work of one device."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from egrpo_jax.common.offload import HOST
from egrpo_jax.common.trees import partition
from egrpo_jax.parallel.mesh import REPLICATED, over_samples, sample_devices
from egrpo_jax.pipelines import sketch_pipeline
from egrpo_jax.planning import hlo
from egrpo_jax.rl.optimizer import make_optimizer
from egrpo_jax.rl.plan import Deal
from egrpo_jax.rl.transitions import Anchors, prompt_keys
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import Job
from egrpo_jax.training.phases import make_phases
from egrpo_jax.training.state import abstract_state

PHASES = ("rollout", "decode", "update")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSALS = (
    re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"),
    re.compile(r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM"),
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device that a phase takes while it runs.

    Attributes:
      arguments: what it is called with.
      outputs: what it returns, where that is not in place of an argument.
      temporaries: what it needs meanwhile.
      program: the code.
    """

    arguments: float
    outputs: float
    temporaries: float
    program: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.arguments + self.outputs + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled phase.

    Attributes:
      phase: one of `PHASES`.
      arguments: bytes of one device, by what they are.
      memory: None if the compiler refused it for want of memory.
      work: of one call and device; None as well.
      refused: the bytes that it would have needed, as the compiler says.
      seconds: that compiling took.
    """

    phase: str
    arguments: dict[str, float]
    memory: Memory | None
    work: hlo.Work | None
    refused: float | None
    seconds: float


def sketch_job(config: TrainConfig) -> Job:
    """A run's constants without a file of the model, the prompts or the rewards; under the mesh that is set.

    Raises:
      UserError: the config is wrong.
    """
    pipeline = sketch_pipeline(config.model)
    return Job(config, config.plan.make_plan(0, config.seed), pipeline, {}, [], [], make_optimizer(config.optim))


def compile_phase(job: Job, mesh: Mesh, phase: str) -> Compiled:
    """Compiles a phase as `train` does, from shapes alone; under `mesh`, which is set."""
    phases = make_phases(job)
    arguments, named = _arguments(job, phases.deal, mesh, phase), named_arguments(job, mesh, phase)
    start = time.perf_counter()
    try:
        compiled = getattr(phases, phase).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        return Compiled(phase, named, None, None, refused_bytes(error), time.perf_counter() - start)
    found = compiled.memory_analysis()
    memory = Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )
    work = hlo.measure(hlo.parse(compiled.as_text()))
    return Compiled(phase, named, memory, work, None, time.perf_counter() - start)


def refused_bytes(error: jax.errors.JaxRuntimeError) -> float:
    """The bytes that a program would have needed; the error itself if it is about something else."""
    matches = (pattern.search(str(error)) for pattern in _REFUSALS)
    found = next(filter(None, matches), None)
    if found is None:
        raise error
    return float(found[1]) * _UNITS[found[2]]


def _arguments(job: Job, deal: Deal, mesh: Mesh, phase: str) -> tuple[Any, ...]:
    """What the phase is called with, as shapes that lie where they would."""
    params = job.pipeline.abstract(mesh)
    count = job.rollouts_at_once
    if phase == "rollout":
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
        schedule = jax.tree.map(lambda table: _replicated(mesh, table), job.plan.schedule())
        return params, schedule, _given(job, mesh, count), _array(mesh, keys.shape, keys.dtype)
    if phase == "decode":
        return params, _array(mesh, (len(deal.sample), *job.pipeline.latents_shape))
    frozen, plan = partition(params, job.pipeline.trainable)[1], job.plan
    advantage = _array(mesh, (job.rollouts, len(plan.step_weights("none")), plan.group_size))
    weights = _replicated(mesh, plan.step_weights("none").astype(np.float32))
    iteration = _replicated(mesh, np.zeros((), np.int32))
    inputs = abstract_transitions(job, mesh), advantage, weights, iteration, _conditioning(job, mesh, job.rollouts)
    return abstract_state(job, mesh), frozen, *inputs


def abstract_transitions(job: Job, mesh: Mesh) -> Any:
    """The random steps of an iteration, or what else its updates learn from."""
    plan, shape = job.plan, job.pipeline.latents_shape
    deal = plan.deal(1, 1, None)

    def one() -> Any:
        keys, still = prompt_keys(jax.random.key(0), 0, 1), lambda *inputs: inputs[1]
        states = jnp.zeros((1, len(plan.branches), *shape))
        given: Any = {} if plan.candidates == 1 else ({}, Anchors(states, states))
        return plan.roll_out(still, {}, deal, plan.schedule(), given, keys, shape).transitions

    return jax.tree.map(lambda x: _array(mesh, (job.rollouts, *x.shape[1:]), x.dtype), jax.eval_shape(one))


def _given(job: Job, mesh: Mesh, count: int) -> Any:
    """The conditioning of rollouts, with their anchors where these have been walked to choose among prompts."""
    conditioning = _conditioning(job, mesh, count)
    if job.plan.candidates == 1:
        return conditioning
    states = (count, len(job.plan.branches), *job.pipeline.latents_shape)
    return conditioning, Anchors(_array(mesh, states), _array(mesh, states))


def _conditioning(job: Job, mesh: Mesh, prompts: int) -> Any:
    return jax.tree.map(lambda leaf: _array(mesh, (prompts, *leaf.shape), leaf.dtype), job.pipeline.conditioning)


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array whose rows are spread over all devices, where these divide them."""
    spec = REPLICATED if shape[0] % sample_devices(mesh) else over_samples()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def _replicated(mesh: Mesh, table: np.ndarray) -> jax.ShapeDtypeStruct:
    """A table that every device has."""
    return jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=NamedSharding(mesh, REPLICATED))


def named_arguments(job: Job, mesh: Mesh, phase: str) -> dict[str, float]:
    """Bytes of one device that the arguments of a phase take, by what they are."""
    arguments = _arguments(job, make_phases(job).deal, mesh, phase)
    if phase != "update":
        return {"weights": bytes_on_device(arguments[0]), "inputs": bytes_on_device(arguments[1:])}
    state, frozen, *inputs = arguments
    parts = {"trained weights": state.params, "frozen weights": frozen, "moments": state.opt_state}
    parts |= {"averages and copies": (state.ema, state.reference, state.trailing), "inputs": inputs}
    return {name: bytes_on_device(part) for name, part in parts.items()}


def bytes_on_device(tree: Any) -> float:
    """Bytes that one device holds of a tree of `jax.ShapeDtypeStruct` with shardings; none of what its host holds."""
    held = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind != HOST]
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in held))
