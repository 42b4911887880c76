"""A plan as text, for people, and as a figure."""

from __future__ import annotations

import os
from collections.abc import Sequence

from jax.sharding import Mesh

from egrpo_jax.figures.cost import PhaseBars, Span, cost_figure
from egrpo_jax.figures.schedule import Tree
from egrpo_jax.parallel.mesh import sample_devices
from egrpo_jax.planning.changes import Trial
from egrpo_jax.planning.cost import PhaseCost, count_passes, uncounted_scorers
from egrpo_jax.planning.devices import GIB, capacity
from egrpo_jax.planning.schedule import schedule
from egrpo_jax.rl.deal import Tails
from egrpo_jax.rl.plan import describe
from egrpo_jax.run.timing import peak_flops
from egrpo_jax.training.job import Job


def overview(job: Job, mesh: Mesh, mfu: float) -> str:
    """The schedule and the work of an iteration, by arithmetic, on the devices of `mesh`.

    `mfu` is the share of their peak at which the seconds are computed: of the model's operations, which are those that
    the metrics `mfu/rollout` and `mfu/update` count.
    """
    return "\n".join(
        [describe(job.plan, job.pipeline.passes), "", *_work(job), "", *_devices(job, mesh), _seconds(job, mesh, mfu)]
    )


def _work(job: Job) -> list[str]:
    count = count_passes(job)
    forward, training = count.forward_flops, count.training_flops
    rows = [
        ("choosing prompts", count.screening, "forward, not compiled here", forward),
        ("shared by samples", count.shared, "forward", forward),
        ("of each sample", count.own, "forward", forward),
        ("decoding", count.images, "images", count.decode_flops),
        ("old log-probabilities", count.scoring, "forward", forward),
        ("update", count.training, "forward and backward, with what is computed again", training),
    ]
    prompts = job.config.prompts_per_iteration
    lines = [
        f"an iteration: {prompts} prompts, {prompts * job.plan.images} images",
        f"{'':24s}passes       PFLOP",
    ]
    for name, passes, kind, flops in rows:
        if passes:
            shown = "unknown" if flops is None else f"{passes * flops / 1e15:.4g}"
            lines.append(f"  {name:21s} {passes:6d}  {shown:>10s}  {kind}")
    return lines


def _devices(job: Job, mesh: Mesh) -> list[str]:
    device = mesh.devices.flat[0]
    limit = capacity(device)
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    usable = "memory unknown" if limit is None else f"{limit / GIB:.2f} GiB usable on each"
    lines = [f"{mesh.size} devices, {device.device_kind}: {axes}; {usable}"]
    deal = job.plan.deal(job.rollouts_at_once, sample_devices(mesh), job.config.tails_per_device)
    if isinstance(deal, Tails):
        passes, slots = len(deal.time), deal.time.shape[1] // sample_devices(mesh)
        lines.append(f"tails: {passes} passes of {slots} on each, {100 * deal.busy:.1f} % of these carry one")
    return lines


def _seconds(job: Job, mesh: Mesh, mfu: float) -> str:
    peak, flops = peak_flops(mesh.devices.flat[0].device_kind), job.pipeline.forward_flops
    if peak is None or flops is None:
        return "seconds: unknown, for want of the peak of these devices or the operations of the model"
    update = job.plan.update_equivalents(job.config.learner)
    passes = job.plan.rollout_passes + update
    total = job.config.prompts_per_iteration * passes * flops
    return (
        f"seconds: {total / (mesh.size * peak * mfu):.1f} an iteration in rollout and update, by arithmetic, at "
        f"{100 * mfu:.0f} % of {peak / 1e12:.0f} TFLOP/s on each; decoding, rewards and evaluation come on top"
    )


def tables(costs: Sequence[PhaseCost]) -> str:
    """Memory, operations and transfers of one device in the phases, as compiled."""
    return "\n".join([*_memory(costs), "", *_operations(costs)])


def _memory(costs: Sequence[PhaseCost]) -> list[str]:
    lines = ["GiB of a device    arguments  outputs  temporaries  beside    total"]
    for cost in costs:
        memory, beside = cost.compiled.memory, sum(cost.beside.values())
        if memory is None:
            own = f"{'refused by the compiler':>30s}"
        else:
            own = f"{memory.arguments / GIB:9.2f}  {memory.outputs / GIB:7.2f}  {memory.temporaries / GIB:11.2f}"
        lines.append(f"  {cost.compiled.phase:15s}  {own}  {beside / GIB:6.2f}  {cost.needed / GIB:7.2f}")
    for cost in costs:
        for title, parts in (("arguments", cost.compiled.arguments), ("beside", cost.beside)):
            shown = ", ".join(f"{name} {value / GIB:.2f}" for name, value in parts.items() if value > 0.005 * GIB)
            lines += [f"  {cost.compiled.phase}, {title}: {shown}"] if shown else []
    return lines


def _operations(costs: Sequence[PhaseCost]) -> list[str]:
    lines = ["an iteration, of a device    TFLOP   of all / devices   received, GB"]
    for cost in costs:
        work = cost.compiled.work
        if work is None:
            continue
        share = "unknown" if cost.repeated is None else f"{cost.repeated:.3f}"
        wire = ", ".join(f"{kind} {cost.calls * value / 1e9:.3g}" for kind, value in work.wire.items())
        lines.append(
            f"  {cost.compiled.phase:18s} {cost.calls * work.flops / 1e12:13.6g}  {share:>17s}   {wire or 'nothing'}"
        )
        if work.unknown_loops:
            lines.append(f"    counted once, for their turns are unknown: {', '.join(work.unknown_loops)}")
        if work.unknown_kernels:
            lines.append(f"    not counted, kernels of unknown work: {', '.join(work.unknown_kernels)}")
    return lines


def verdict(job: Job, mesh: Mesh, costs: Sequence[PhaseCost]) -> str:
    """A line for each phase, with its largest part, and what is not counted."""
    lines = []
    for cost in costs:
        name, size = cost.largest
        largest = f"the largest part is {name}, {size / GIB:.2f} GiB"
        if cost.capacity is None:
            lines.append(f"{cost.compiled.phase}: {cost.needed / GIB:.2f} GiB a device; {largest}")
        else:
            word = "fits" if cost.fits else "does not fit"
            need = f"{cost.needed / GIB:.2f} of {cost.capacity / GIB:.2f} GiB"
            lines.append(f"{cost.compiled.phase}: {word}, {need}; {largest}")
    missing = uncounted_scorers(job.config, mesh)
    if missing:
        lines.append(f"not counted: the rewards {', '.join(missing)}, whose sizes are not known here")
    lines.append("not counted: what rewards and evaluation take beside their parameters")
    return "\n".join(lines)


def trial_line(trial: Trial) -> str:
    """A change that was tried, and what came of it."""
    how = "compiled" if trial.is_compiled else "by arithmetic, without temporaries"
    return f"  {'fits' if trial.fits else 'does not fit'}: {trial.text}: {trial.needed / GIB:.2f} GiB ({how})"


def draw(job: Job, mesh: Mesh, costs: Sequence[PhaseCost], path: str | os.PathLike[str]) -> None:
    """Writes the plan as a PNG. Raises UserError if `path` cannot be written."""
    spans = [Span(branch.step, branch.stop, branch.exp_entropy) for branch in job.plan.branches]
    tree = schedule(job.plan)
    shown = tree if isinstance(tree, Tree) else spans
    title = f"{job.config.name} on {mesh.size} x {mesh.devices.flat[0].device_kind}"
    bars = {cost.compiled.phase: _bars(cost) for cost in costs}
    cost_figure(job.plan.times, shown, bars, costs[0].capacity, title, path)


def _bars(cost: PhaseCost) -> PhaseBars:
    memory, work = cost.compiled.memory, cost.compiled.work
    if memory is None or work is None:
        return PhaseBars({"refused": cost.needed - sum(cost.beside.values()), **cost.beside}, 0.0, {})
    parts = {"arguments": memory.arguments, "outputs": memory.outputs, "temporaries": memory.temporaries}
    wire = {kind: cost.calls * value for kind, value in work.wire.items()}
    return PhaseBars(parts | cost.beside, cost.calls * work.flops, wire)
