"""Host memory while a FLUX checkpoint is loaded: `python benchmarks/load_memory.py --format bfl --devices 8`.

Writes random bfloat16 weights of FLUX.1's width and fewer blocks (4.5 GB unless told otherwise) into a temporary
folder and loads them in a fresh process onto CPU devices, whose arrays are host memory. Prints a Markdown row: the
excess is what the process took at its peak beyond what it had before loading and what its arrays hold.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.models.flux import Flux, FluxConfig
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.parallel.rules import with_shardings
from egrpo_jax.pipelines.families import FLUX
from egrpo_jax.weights.export import export_folder
from egrpo_jax.weights.files import open_tensors
from egrpo_jax.weights.layout import published_shapes
from egrpo_jax.weights.load import load_params
from egrpo_jax.weights.published.flux import config_to_diffusers, flux_layout


def template(config: FluxConfig) -> Any:
    """The parameter tree's shapes in bfloat16."""
    arrays = [jnp.zeros(shape) for shape in ((1, 1, config.in_channels), (1,), (1, 1, config.text_dim))]
    arrays += [jnp.zeros((1, config.pooled_dim)), jnp.ones(1)]
    model = Flux(config, param_dtype=jnp.bfloat16)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *arrays, grid=(1, 1)))["params"]


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """bfloat16 of every magnitude below 2."""
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        bits = rng.integers(0, 2**16, shape, np.uint16) & 0xBFFF
        yield name, bits.view(jnp.bfloat16)


def write(config: FluxConfig, fmt: Any, folder: Path) -> None:
    """A checkpoint in `folder`, after a look at the room on its disk."""
    shapes = published_shapes(flux_layout(config, fmt), template(config))
    needed = 2 * sum(int(np.prod(shape)) for shape in shapes.values())
    free = shutil.disk_usage(folder.parent).free
    if free < 1.1 * needed:
        raise SystemExit(f"{folder.parent} has {free / 1e9:.1f} GB free, the checkpoint needs {needed / 1e9:.1f} GB")
    export_folder(folder, random_tensors(shapes), shapes, config_to_diffusers(config), jnp.bfloat16)


def peak_memory() -> int:
    """The largest resident memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(config: FluxConfig, fmt: Any, folder: Path) -> dict[str, float]:
    """Loads `folder` and says what it took, in bytes and seconds."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    wanted = with_shardings(mesh, FLUX.rules, {"flow": template(config)})["flow"]
    files = open_tensors(folder)
    jnp.zeros(1).block_until_ready()
    before, start = peak_memory(), time.monotonic()
    params = load_params(files, flux_layout(config, fmt), wanted)
    seconds = time.monotonic() - start
    leaves = jax.tree.leaves(params)
    return {
        "seconds": seconds,
        "before": before,
        "held": sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
        "peak": peak_memory(),
        "largest": max(files[name].nbytes for name in files),
    }


def main() -> None:
    """Writes, loads in another process, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", choices=["diffusers", "bfl"], default="diffusers")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices, over which parameters are sharded")
    parser.add_argument("--blocks", type=int, nargs=2, default=(4, 6), help="double and single blocks; FLUX.1: 19 38")
    parser.add_argument("--load", type=Path, help="only measure, on a folder written before")
    args = parser.parse_args()
    config = FluxConfig(num_double_blocks=args.blocks[0], num_single_blocks=args.blocks[1])
    if args.load is not None:
        print(json.dumps(measure(config, args.format, args.load)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "transformer"
        write(config, args.format, folder)
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices)}
        command = [sys.executable, __file__, *sys.argv[1:], "--load", str(folder)]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    megabytes = [round(result[key] / 1e6) for key in ("held", "before", "peak", "largest")]
    excess = (result["peak"] - result["before"] - result["held"]) / result["largest"]
    print("| format | devices | arrays hold, MB | process before | at its peak | largest tensor | excess | seconds |")
    print("|---" * 8 + "|")
    columns = (args.format, args.devices, *megabytes, f"{excess:.2f} tensors", f"{result['seconds']:.0f}")
    print(f"| {' | '.join(map(str, columns))} |")


if __name__ == "__main__":
    main()
