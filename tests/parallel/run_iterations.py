"""Runs three iterations of a config on the devices there are, those of other processes too where it is told of these.

`run_iterations.py CONFIG[:ARG][@PROMPTSxGROUP] OUT DATA FSDP TENSOR [HOST:PORT PROCESSES PROCESS]`; process 0 writes
OUT.
"""

import contextlib
import dataclasses
import importlib.util
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.trees import combine
from egrpo_jax.parallel import hosts
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.rl.transitions import prompt_keys
from egrpo_jax.run.checkpoint import Checkpoints
from egrpo_jax.run.timing import PhaseTimer
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.iteration import of_seeds, run_iteration, sample_and_score
from egrpo_jax.training.job import make_job
from egrpo_jax.training.phases import make_phases
from egrpo_jax.training.screening import Given, choose_prompts
from egrpo_jax.training.state import start_or_resume


def main(config_file, out, *where):
    axes, processes = where[:3], where[3:]
    if processes:
        hosts.start(processes[0], int(processes[1]), int(processes[2]))
    config_file, _, size = config_file.partition("@")
    prompts, group_size = map(int, (size or "8x3").split("x"))
    config_file, _, argument = config_file.partition(":")
    spec = importlib.util.spec_from_file_location("config_file", config_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(argument) if argument else module.get_config()
    config.prompts_per_iteration, config.plan.group_size = prompts, group_size
    if config.plan.algorithm == "egrpo":
        config.plan.num_steps = 4
    config.rewards.heldout = ()
    config = dataclasses.replace(from_config_dict(TrainConfig, config), mesh=MeshConfig(*map(int, axes)))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        job = make_job(config, mesh)
        with contextlib.closing(Checkpoints(tempfile.mkdtemp())) as empty:
            progress, frozen = start_or_resume(job, empty, mesh)
        phases = make_phases(job)
        samples = draw(job, phases, frozen, progress)
        for _ in range(3):
            progress, metrics = run_iteration(job, phases, frozen, progress, PhaseTimer())
        whole = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
        found = whole({"state": progress.state, "samples": samples.transitions})
    found |= {"scores": samples.scores, "finite": samples.finite}
    leaves = {jax.tree_util.keystr(p): np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(found)}
    numbers = {"reward": metrics[f"reward/{config.rewards.train[0]}/mean"], "ratio": metrics["ratio/max_deviation"]}
    if hosts.leads():
        np.savez(Path(out), **numbers, **leaves)


def draw(job, phases, frozen, progress):
    """The first iteration's samples, by parameters that are the same everywhere."""
    prompts = job.prompts[: job.config.prompts_per_iteration * job.plan.candidates]
    prompts, conditioning = of_seeds(job.plan, prompts, job.pipeline.encode(prompts))
    given = Given(prompts, conditioning, prompt_keys(progress.key, 0, len(prompts)))
    params, schedule = combine(progress.state.params, frozen), job.plan.schedule()
    if job.plan.candidates > 1:
        given = choose_prompts(job, phases, params, given, None, PhaseTimer())
    return sample_and_score(job, phases, params, schedule, given, PhaseTimer())


if __name__ == "__main__":
    main(*sys.argv[1:])
