"""FLUX.1-dev on TPU slices, compiled one after another: what fits where, and how work and transfers grow.

    python -m benchmarks.slices --only=v5p:2x2x1 --only=v6e:2x4     # needs the extra `tpu`; 1 to 20 minutes a phase
    python -m benchmarks.slices --only=none                         # the table and the plot of what is there

The paper's setting, 720 x 720 pixels, with 2 prompts for each chip, stored embeddings and HPSv2.1.
What is compiled is kept in docs/results/slices.json and not compiled again; the table is for docs/scaling.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags

from egrpo_jax import cli
from egrpo_jax.figures.plots import new_figure, save_figure
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.pipelines import ModelConfig
from egrpo_jax.pipelines.published import FLOW_GRPO, PublishedOptions
from egrpo_jax.planning.cost import phase_cost
from egrpo_jax.planning.devices import GIB, slice_devices
from egrpo_jax.planning.phases import sketch_job
from egrpo_jax.rewards import ScorersConfig
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.optimizer import OptimConfig
from egrpo_jax.training.config import RewardsConfig, TrainConfig

SCALED = ("v5p:2x2x1", "v5p:2x2x2", "v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8")
SLICES = (*SCALED, "v4:2x2x4", "v4:2x4x4", "v5e:4x4", "v5e:8x8", "v6e:2x4", "v6e:4x4", "tpu7x:2x2x1", "tpu7x:2x2x2")
KINDS = {
    "full": "all weights",
    "offload": "all weights, moments and scorers on the hosts",
    "lora": "LoRA",
    "int8": "LoRA, base in int8",
}
PHASES = ("rollout", "update")
RESULTS = Path(__file__).parent.parent / "docs" / "results"
TAILS = 12
"""Slots of a device."""
FSDP = {"v4": 8, "v5p": 4, "v5e": 16, "v6e": 8, "tpu7x": 4}
"""Devices over which weights are split; the others hold copies. Over more, a gather sends more and smaller pieces. All
weights fit so on v5p and v6e, with their moments on the hosts on v5e; on the others that is not known."""

FLAGS = flags.FlagValues()
ONLY = flags.DEFINE_multi_string(
    "only", list(SLICES), "Slices to compile, of those in the list; none: no more.", flag_values=FLAGS
)
KIND = flags.DEFINE_multi_enum(
    "kind",
    list(KINDS),
    list(KINDS),
    "All weights, their moments on the hosts, adapters, or these to a base in int8.",
    flag_values=FLAGS,
)
ONE = flags.DEFINE_string("one", None, "slice/kind/phase: compile this here, and print it as JSON.", flag_values=FLAGS)


def config(kind: str, generation: str, chips: int) -> TrainConfig:
    """The run on `chips` chips of a `generation`."""
    lora, offload = FLOW_GRPO if kind in ("lora", "int8") else None, kind == "offload"
    options = PublishedOptions(embeddings="made before", lora=lora, int8_base=kind == "int8")
    return TrainConfig(
        prompts_per_iteration=2 * chips,
        tails_per_device=TAILS,
        model=ModelConfig("published", "black-forest-labs/FLUX.1-dev", options),
        rewards=RewardsConfig(train=("hpsv2.1",)),
        scorers=ScorersConfig(offload=offload),
        optim=OptimConfig(offload=offload),
        learner=LearnerConfig(micro_batch=1),
        mesh=MeshConfig(data=-1, fsdp=FSDP[generation]),
    )


def compile_one(topology: str, kind: str, phase: str) -> dict[str, Any]:
    """What `plan` finds, as numbers of one device and iteration."""
    devices = slice_devices(topology)
    run = config(kind, topology.split(":")[0], len({tuple(device.coords) for device in devices}))
    mesh = make_mesh(run.mesh, devices)
    with jax.set_mesh(mesh):
        cost = phase_cost(sketch_job(run), mesh, phase)
    work = cost.compiled.work
    return {
        "devices": mesh.size,
        "prompts": run.prompts_per_iteration,
        "needed": cost.needed,
        "capacity": cost.capacity,
        "fits": cost.fits,
        "flops": work and work.flops,
        "repeated": cost.repeated,
        "wire": work and work.wire,
        "seconds": cost.compiled.seconds,
    }


def compile_missing(found: dict[str, Any], file: Path) -> None:
    """Compiles what is asked for and not in `found`, each in a process of its own, and writes it down at once."""
    wanted = [f"{topology}/{kind}/{phase}" for topology in SLICES for kind in KIND.value for phase in PHASES]
    for name in wanted:
        if name in found or name.split("/")[0] not in ONLY.value:
            continue
        print(f"compiling {name} ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.slices", f"--one={name}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def table(found: dict[str, Any]) -> str:
    """A Markdown table, a row for each slice and kind."""
    lines = [
        "| slice | devices, prompts | trained | rollout, GiB | update, GiB | of GiB | fits | FLOPs | GB received |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for topology in SLICES:
        for kind in KINDS:
            rows = [found.get(f"{topology}/{kind}/{phase}") for phase in PHASES]
            if all(rows):
                lines.append(_row(topology, kind, rows))
    return "\n".join(lines)


def _row(topology: str, kind: str, phases: list[dict[str, Any]]) -> str:
    rollout, update = phases
    fits = "yes" if rollout["fits"] and update["fits"] else "no"
    repeated = " / ".join("-" if each["repeated"] is None else f"{each['repeated']:.2f}" for each in phases)
    wire = " / ".join("-" if each["wire"] is None else f"{sum(each['wire'].values()) / 1e9:,.0f}" for each in phases)
    cells = [
        f"`{topology}`",
        f"{rollout['devices']}, {rollout['prompts']}",
        KINDS[kind],
        f"{rollout['needed'] / GIB:.1f}",
        f"{update['needed'] / GIB:.1f}",
        f"{rollout['capacity'] / GIB:.1f}",
        fits,
        repeated,
        wire,
    ]
    return f"| {' | '.join(cells)} |"


def plot(found: dict[str, Any], path: Path) -> None:
    """Operations and bytes of one device by the number of devices, at 2 prompts for each."""
    figure = new_figure(9, 3.6)
    flops, wire = figure.subplots(1, 2)
    for kind in KINDS:
        for phase in PHASES:
            rows = [found.get(f"{topology}/{kind}/{phase}") for topology in SCALED]
            shown = [row for row in rows if row and row["flops"] is not None]
            if len(shown) < 2:  # no line
                continue
            devices, label = [row["devices"] for row in shown], f"{phase}, {KINDS[kind]}"
            flops.plot(devices, [row["flops"] / 1e15 for row in shown], marker="o", label=label)
            wire.plot(devices, [sum(row["wire"].values()) / 1e9 for row in shown], marker="o", label=label)
    for axes, title in ((flops, "PFLOP of a chip, an iteration"), (wire, "GB received by a chip, an iteration")):
        axes.set_title(title, fontsize=11)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(top=2 * axes.get_ylim()[1])
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel("chips of v5p, 2 prompts each")
        axes.grid(alpha=0.3)
    flops.legend(fontsize=8, loc="center")
    save_figure(figure, path)


def main() -> None:
    """Compiles what is missing, prints the table and draws the plot."""
    if ONE.value is not None:
        print(json.dumps(compile_one(*ONE.value.split("/"))))
        return
    file = RESULTS / "slices.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    compile_missing(found, file)
    print(table(found))
    plot(found, RESULTS / "slices.png")


if __name__ == "__main__":
    cli.run(main, FLAGS)
