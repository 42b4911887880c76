"""The cost of a training run before it is started, and whether it fits, by compiling its phases from shapes alone.

    python -m egrpo_jax.plan --config configs/flux_egrpo.py --topology v5p:2x2x2
    python -m egrpo_jax.plan --config configs/emoji.py --devices 8

Needs neither weights, prompts and rewards nor the devices: for a TPU slice its compiler, the extra `tpu`, on any
machine; without --topology the devices are those at hand, of CPUs as many as asked for. FLUX.1 takes minutes a phase.
"""

from __future__ import annotations

import sys

import jax
from absl import flags

from egrpo_jax import cli
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.errors import UserError
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.planning.changes import try_changes
from egrpo_jax.planning.cost import phase_cost
from egrpo_jax.planning.devices import devices_at_hand, slice_devices
from egrpo_jax.planning.phases import PHASES, sketch_job
from egrpo_jax.planning.report import draw, overview, tables, trial_line, verdict
from egrpo_jax.training.config import TrainConfig

FLAGS = flags.FlagValues()
CONFIG = cli.define_config(FLAGS)
TOPOLOGY = flags.DEFINE_string("topology", None, "TPU slice, such as v5p:2x2x2 or v6e:2x4.", flag_values=FLAGS)
DEVICES = flags.DEFINE_integer("devices", None, "Devices at hand; all by default.", lower_bound=1, flag_values=FLAGS)
PHASE = flags.DEFINE_multi_enum("phase", PHASES, PHASES, "Phases to compile; all by default.", flag_values=FLAGS)
MFU = flags.DEFINE_float("mfu", 0.4, "Share of the peak at which seconds are computed.", 0.001, 1.0, flag_values=FLAGS)
SEARCH = flags.DEFINE_bool(
    "search", True, "Compile changes to a phase that does not fit, until two fit.", flag_values=FLAGS
)
DRAW = flags.DEFINE_string("draw", None, "PNG of the plan to write.", flag_values=FLAGS)


def main() -> None:
    """Plans, phase by phase."""
    config = from_config_dict(TrainConfig, CONFIG.value)
    if TOPOLOGY.value is not None and DEVICES.value is not None:
        raise UserError("--devices: found it beside --topology, expected one of them")
    devices = devices_at_hand(DEVICES.value) if TOPOLOGY.value is None else slice_devices(TOPOLOGY.value)
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        job = sketch_job(config)
        print(overview(job, mesh, MFU.value), end="\n\n", flush=True)
        costs = []
        for phase in dict.fromkeys(PHASE.value):
            print(f"compiling {phase} ...", file=sys.stderr, flush=True)
            costs.append(phase_cost(job, mesh, phase))
    print(tables(costs), verdict(job, mesh, costs), sep="\n\n", flush=True)
    if DRAW.value is not None:
        draw(job, mesh, costs, DRAW.value)
    for cost in (cost for cost in costs if not cost.fits and SEARCH.value):
        print(f"\n{cost.compiled.phase}, with a change:", flush=True)
        for trial in try_changes(job, mesh, cost, TOPOLOGY.value):
            print(trial_line(trial), flush=True)


if __name__ == "__main__":
    cli.run(main, FLAGS)
