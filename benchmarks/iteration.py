"""A whole iteration of E-GRPO: our engine against loops in PyTorch over diffusers' FLUX, side by side in one run.

    python -m benchmarks.iteration --rounds=4

needs the `oracle` extra; `--peer=false` measures ours alone. On the CPU, float32, two threads for PyTorch: a FLUX of
two double and four single blocks, 256 image and 64 text tokens, the same random weights in both; two prompts, 8 steps,
groups of 4. There is no decoder: the reward is a mean of the latents that a sigmoid has squashed. Ours is what `train`
runs (`training/iteration.py`, `training/phases.py`). `torch_loop.py` says what the loops do; measured are

- *one at a time*: the rollout in batches of one, the update with a forward and a backward pass of each sample;
- *in groups*: the same with a group in each call;
- *one at a time, shared update*: the rollout in batches of one, one forward and backward pass for all samples of a
  state, as E-GRPO's own code does.

First velocities, tails from the same samples, and the gradient of the same update are compared. Rounds alternate, so
that what else the machine does falls on all. Printed as Markdown: minima over rounds, and ratios theirs / ours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import flags

from benchmarks.measure import alternate
from benchmarks.random_flux import SMALL, Shape, first_progress, random_pipeline, training_job
from egrpo_jax import cli
from egrpo_jax.common.trees import combine
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.plan import describe
from egrpo_jax.rl.transitions import prompt_keys
from egrpo_jax.run.timing import PhaseTimer
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.iteration import run_iteration
from egrpo_jax.training.phases import make_phases
from egrpo_jax.weights.layout import Params

if TYPE_CHECKING:
    from benchmarks.torch_loop import TorchLoop

FLAGS = flags.FlagValues()
PEER = flags.DEFINE_bool("peer", True, "Time PyTorch too.", flag_values=FLAGS)
THREADS = flags.DEFINE_integer("threads", 2, "PyTorch's threads.", flag_values=FLAGS)
ROUNDS = flags.DEFINE_integer("rounds", 4, "Alternating measurements.", flag_values=FLAGS)

SHAPE = Shape(SMALL, (16, 16), 64)
LOOPS = (("one at a time", 0, 2), ("in groups", 1, 3), ("one at a time, shared update", 0, 4))
"""Each with its rollout and its update, of `their_parts`."""
CONFIG = TrainConfig(prompts_per_iteration=2, plan=EGrpo(num_steps=8, group_size=4))


class Ours:
    """The engine, on a model with random weights.

    Attributes:
      seconds: of each iteration so far, by phase.
    """

    def __init__(self, shape: Shape, config: TrainConfig):
        self.job = training_job(random_pipeline(shape, "float32", "float32"), config)
        self.progress, self.frozen = first_progress(self.job, jax.sharding.get_mesh())
        self.phases = make_phases(self.job)
        self.seconds: list[dict[str, float]] = []

    @property
    def params(self) -> Params:
        """All parameters."""
        return combine(self.progress.state.params, self.frozen)

    @property
    def passes(self) -> tuple[int, int]:
        """Samples that the model is called on in the rollout, idle slots of tails included, and with gradients."""
        count, plan = self.job.config.prompts_per_iteration, self.job.plan
        return count * plan.num_steps + self.phases.deal.carried.size, count * plan.training_passes

    def iterate(self) -> dict[str, float]:
        """One iteration; its numbers."""
        timer = PhaseTimer()
        with timer.phase("iteration"):
            self.progress, numbers = run_iteration(self.job, self.phases, self.frozen, self.progress, timer)
        self.seconds.append({name.removeprefix("seconds/"): value for name, value in timer.take().items()})
        return numbers


def compare(ours: Ours, loop: TorchLoop) -> None:
    """Raises where `loop` does not compute the same as `ours`: velocities, tails, the gradient of an update."""
    import torch

    from benchmarks.torch_loop import Samples

    count, plan = ours.job.config.prompts_per_iteration, ours.job.plan
    conditioning = ours.job.pipeline.encode(ours.job.prompts)
    rollout = ours.phases.rollout(ours.params, plan.schedule(), conditioning, prompt_keys(jax.random.key(1), 0, count))
    steps = jax.tree.map(np.array, rollout.transitions[0])
    ends = np.empty_like(steps.next_latents)
    ends.reshape(-1, *ends.shape[-2:])[ours.phases.deal.sample] = rollout.latents
    samples = Samples(*map(torch.from_numpy, (steps.latents, steps.next_latents, ends, steps.log_prob)))

    states, times = steps.latents[:1, 0], steps.time[:1, 0]
    velocity = ours.job.pipeline.velocity(ours.params, states, times, {k: v[:1] for k, v in conditioning.items()})
    with torch.no_grad():
        check_near("velocities", velocity, loop.velocity(samples.latents[:1, 0], float(times[0]), prompt=0))
    check_near("ends of tails", ends, loop.ends(samples.next_latents))

    advantage = np.random.default_rng(0).standard_normal(steps.log_prob.shape, np.float32)
    norms = [loop.gradient(samples, torch.from_numpy(advantage), *how) for how in updates(plan.group_size)]
    weights = np.ones(len(plan.branches), np.float32)
    state, stats = ours.phases.update(
        ours.progress.state, ours.frozen, rollout.transitions, advantage, weights, np.int32(0), conditioning
    )  # which leaves nothing of the state that it was given
    ours.progress = ours.progress._replace(state=state)
    check_near("norms of the gradient", np.repeat(stats.grad_norm, len(norms)), norms)


def check_near(what: str, ours: Any, theirs: Any) -> None:
    """Raises unless `ours` are `theirs` to 1e-4 of the largest; prints the difference."""
    error = np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max()
    print(f"largest difference of {what} / the largest: {error:.1e}")
    if not error <= 1e-4:
        raise AssertionError(f"not the same {what}")


def updates(group_size: int) -> list[tuple[int, bool]]:
    """Batch, and whether it is shared, of each update that is timed."""
    return [(1, False), (group_size, False), (group_size, True)]


@dataclasses.dataclass
class Counted:
    """A part of an iteration of `loop`, and the samples that it called the model on."""

    loop: TorchLoop
    part: Callable[[], None]
    calls: int = 0

    def __call__(self) -> None:
        before = self.loop.calls
        self.part()
        self.calls = self.loop.calls - before


def their_parts(ours: Ours, loop: TorchLoop) -> list[Counted]:
    """Two rollouts and the three updates; an update takes the samples of the rollout before it."""
    import torch

    count, group_size = ours.job.config.prompts_per_iteration, ours.job.plan.group_size
    latest = []

    def roll_out(batch: int) -> None:
        latest[:] = [loop.roll_out(torch.randn(count, *ours.job.pipeline.latents_shape), batch)]

    rollouts = [functools.partial(roll_out, batch) for batch in (1, group_size)]
    learn = lambda *how: lambda: loop.update(latest[0], *how)
    return [Counted(loop, part) for part in (*rollouts, *(learn(*how) for how in updates(group_size)))]


def row(name: str, seconds: np.ndarray, calls: tuple[int, int], base: np.ndarray) -> str:
    """A line of the table: minima over rounds of `seconds [rounds, (rollout, update)]`, and ratios to those of ours."""
    least, reference = (np.append(x, x.sum(1, keepdims=True), axis=1).min(0) for x in (seconds, base))
    cells = [f"{value:.2f} ({value / of:.2f})" for value, of in zip(least, reference, strict=True)]
    return " | ".join(["", name, *cells, *map(str, calls), ""]).strip()


def main() -> None:
    """Compares, times and prints."""
    with jax.set_mesh(make_mesh(MeshConfig())):
        ours = Ours(SHAPE, CONFIG)
        print(describe(ours.job.plan))
        parts = _peer(ours) if PEER.value else []
        taken = alternate([ours.iterate, *parts], ROUNDS.value)
    update = np.array([seconds["update"] for seconds in ours.seconds[1:]])
    base = np.stack([taken[:, 0] - update, update], 1)
    print("| | rollout, s | update, s | iteration, s | samples forward | samples forward and backward |")
    print("|---|---|---|---|---|---|")
    print(row("ours", base, ours.passes, base))
    for name, rollout, learn in LOOPS[: len(parts)]:
        calls = parts[rollout].calls, parts[learn].calls
        print(row(name, taken[:, [1 + rollout, 1 + learn]], calls, base))


def _peer(ours: Ours) -> list[Counted]:
    import torch

    from benchmarks.torch_loop import TorchLoop

    torch.set_num_threads(THREADS.value)
    loop = TorchLoop(SHAPE, ours.params["flow"], ours.job.plan, CONFIG)
    compare(ours, loop)
    return their_parts(ours, loop)


if __name__ == "__main__":
    cli.run(main, FLAGS)
