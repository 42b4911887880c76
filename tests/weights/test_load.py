"""Published tensors on devices: every form, stacks, fused tensors, sharded over devices and processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec
from safetensors.numpy import save_file

from egrpo_jax.common.errors import UserError
from egrpo_jax.weights.files import PREFIXES, TensorFiles, open_tensors
from egrpo_jax.weights.layout import CONV, LINEAR, LINEAR_SWAPPED, POINT_CONV, SWAPPED, entry, for_layers, linear
from egrpo_jax.weights.load import load_params

ROOT = Path(__file__).parent.parent.parent
LAYERS = 3
LAYOUT = (
    entry("temperature", "temperature"),
    entry("embed.weight", "embed/embedding"),
    entry("conv.weight", "conv/kernel", form=CONV),
    entry("point.weight", "point/kernel", form=POINT_CONV),
    entry("mod.weight", "mod/kernel", form=LINEAR_SWAPPED),
    entry("mod.bias", "mod/bias", form=SWAPPED),
    *for_layers(LAYERS, (*linear("h.{}.qkv", "h/q", "h/k", "h/v"), *linear("h.{}.out", "h/out"))),
    *for_layers(LAYERS, (entry("h.{}.norm", "h/norm/scale"), entry("h.{}.bare", "h/bare/kernel", form=LINEAR))),
)
SHAPES = {
    "temperature": (), "embed/embedding": (6, 4), "conv/kernel": (3, 3, 4, 8), "point/kernel": (4, 8),
    "mod/kernel": (4, 8), "mod/bias": (8,),
    "h/q/kernel": (LAYERS, 4, 8), "h/k/kernel": (LAYERS, 4, 2), "h/v/kernel": (LAYERS, 4, 6),
    "h/q/bias": (LAYERS, 8), "h/k/bias": (LAYERS, 2), "h/v/bias": (LAYERS, 6),
    "h/out/kernel": (LAYERS, 8, 4), "h/out/bias": (LAYERS, 4),
    "h/norm/scale": (LAYERS, 5), "h/bare/kernel": (LAYERS, 2, 4),
}  # fmt: skip
SPECS = {
    "embed/embedding": PartitionSpec("fsdp"),
    "conv/kernel": PartitionSpec(None, None, "fsdp", "tensor"),
    "point/kernel": PartitionSpec("fsdp", "tensor"),
    "mod/kernel": PartitionSpec("fsdp", "tensor"),
    "mod/bias": PartitionSpec(("tensor", "fsdp")),
    "h/q/kernel": PartitionSpec(None, "fsdp", "tensor"),
    "h/k/kernel": PartitionSpec(None, "fsdp", "tensor"),
    "h/v/kernel": PartitionSpec(None, None, "tensor"),
    "h/out/kernel": PartitionSpec(None, "tensor", "fsdp"),
    "h/bare/kernel": PartitionSpec(None, "tensor"),
}


def template(dtype=jnp.float32, mesh=None):
    """Shapes of our tree, laid out as SPECS on `mesh`."""

    def struct(path, shape):
        sharding = None if mesh is None else jax.NamedSharding(mesh, SPECS.get(path, PartitionSpec()))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return unflatten_dict({path: struct(path, shape) for path, shape in SHAPES.items()}, sep="/")


def params():
    """Different numbers everywhere, exact in bfloat16."""
    rng = np.random.default_rng(0)
    return unflatten_dict(
        {path: rng.integers(-99, 99, shape).astype(np.float32) for path, shape in SHAPES.items()}, sep="/"
    )


def published(tree, dtype=np.float32):
    """What a PyTorch model with these parameters would save, written out without the layout."""
    p = flatten_dict(tree, sep="/")
    swap = lambda x: np.roll(x, len(x) // 2, axis=0)
    tensors = {
        "temperature": p["temperature"],
        "embed.weight": p["embed/embedding"],
        "conv.weight": np.einsum("hwio->oihw", p["conv/kernel"]),
        "point.weight": np.einsum("io->oi", p["point/kernel"]).reshape(8, 4, 1, 1),
        "mod.weight": swap(np.einsum("io->oi", p["mod/kernel"])),
        "mod.bias": swap(p["mod/bias"]),
    }
    for n in range(LAYERS):
        tensors[f"h.{n}.qkv.weight"] = np.concatenate([p[f"h/{name}/kernel"][n] for name in "qkv"], axis=1).T
        tensors[f"h.{n}.qkv.bias"] = np.concatenate([p[f"h/{name}/bias"][n] for name in "qkv"])
        tensors[f"h.{n}.out.weight"] = p["h/out/kernel"][n].T
        tensors[f"h.{n}.out.bias"] = p["h/out/bias"][n]
        tensors[f"h.{n}.norm"] = p["h/norm/scale"][n]
        tensors[f"h.{n}.bare"] = p["h/bare/kernel"][n].T
    return {name: np.array(tensor, dtype, order="C") for name, tensor in tensors.items()}


def save(folder, tensors):
    path = folder / "model.safetensors"
    save_file(tensors, path)
    return open_tensors(path)


@pytest.mark.parametrize("stored", [np.float32, jnp.bfloat16, np.float16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_every_form_stack_and_fused_tensor(tmp_path, stored, wanted):
    files = save(tmp_path, published(params(), stored))
    loaded = load_params(files, LAYOUT, template(wanted))
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == wanted for leaf in jax.tree.leaves(loaded))
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), loaded), params())


def test_without_a_sharding_parameters_work_with_arrays_anywhere(tmp_path):
    loaded = load_params(save(tmp_path, published(params())), LAYOUT, template())
    assert not any(leaf.committed for leaf in jax.tree.leaves(loaded))


def test_a_prefixed_file_and_shards(tmp_path):
    tensors = published(params())
    files = save(tmp_path, {PREFIXES[0] + name: tensor for name, tensor in tensors.items()})
    chex.assert_trees_all_equal(load_params(files, LAYOUT, template()), params())

    names = list(tensors)
    weight_map = {name: f"part-{place % 3}.safetensors" for place, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    chex.assert_trees_all_equal(load_params(open_tensors(tmp_path), LAYOUT, template()), params())


def test_the_loaded_arrays_do_not_need_the_file(tmp_path):
    files = save(tmp_path, published(params()))
    loaded = load_params(files, LAYOUT, template())
    content = bytes(files.path.stat().st_size)
    files.path.write_bytes(content)  # the same file, now zeros
    chex.assert_trees_all_equal(loaded, params())


def test_every_mistake_is_named_in_one_line(tmp_path):
    tensors = published(params())
    del tensors["h.1.norm"], tensors["temperature"]
    tensors["extra"] = np.zeros(1)
    tensors["conv.weight"] = tensors["conv.weight"][:, :3]
    tensors["h.0.out.bias"] = tensors["h.0.out.bias"].astype(np.int64)
    files = save(tmp_path, tensors)
    with pytest.raises(UserError) as caught:
        load_params(files, LAYOUT, template())
    assert str(caught.value) == (
        f"{files.path} does not hold the model that was asked for: of its 24 tensors "
        "2 missing (temperature, h.1.norm); 1 unexpected (extra); "
        "1 of another shape (conv.weight [8, 3, 3, 3] instead of [8, 4, 3, 3]); "
        "1 not floating-point (h.0.out.bias int64); give the file of the right model, whole"
    )


def test_the_file_of_another_model(tmp_path):
    files = save(tmp_path, {f"other.{number}": np.zeros(2) for number in range(30)})
    with pytest.raises(
        UserError, match=r"24 missing \(temperature, .* and 16 more\); 30 unexpected \(.* and 22 more\)"
    ):
        load_params(files, LAYOUT, template())


def test_names_to_ignore_are_patterns_of_whole_names(tmp_path):
    files = save(tmp_path, published(params()) | {"position_ids": np.arange(3), "old.position_ids": np.arange(3)})
    chex.assert_trees_all_equal(load_params(files, LAYOUT, template(), (r"(old\.)?position_ids",)), params())
    with pytest.raises(UserError, match=r"1 unexpected \(old.position_ids\)"):
        load_params(files, LAYOUT, template(), ("position_ids",))


def test_a_layout_that_forgets_a_leaf_or_a_layer(tmp_path):
    files = save(tmp_path, published(params()))
    ignored = [r".*"]
    without_leaf = tuple(e for e in LAYOUT if e.name != "mod.bias")
    with pytest.raises(ValueError, match=r"the layout holds \[\] of mod/bias"):
        load_params(files, without_leaf, template(), ignored)
    without_layer = tuple(e for e in LAYOUT if e.name != "h.1.norm")
    with pytest.raises(ValueError, match=r"the layout holds \[0, 2\] of h/norm/scale"):
        load_params(files, without_layer, template(), ignored)


def mesh_of(data, fsdp, tensor):
    types = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((data, fsdp, tensor), ("data", "fsdp", "tensor"), axis_types=types)


class CountingArray(np.ndarray):
    """Counts the numbers that are read to be converted, of itself and of all its views."""

    read = 0

    def astype(self, dtype):
        CountingArray.read += self.size
        return np.asarray(self).astype(dtype)


class CountingFiles(TensorFiles):
    def __getitem__(self, name):
        return super().__getitem__(name).view(CountingArray)


def load_and_compare(path):
    """Loads onto every device there is; each device must hold its slice, laid out as asked for, read once."""
    mesh = mesh_of(*((2, 2, 2) if jax.device_count() == 8 else (1, 2, 2)))
    wanted = template(jnp.bfloat16, mesh)
    loaded = load_params(CountingFiles(path, open_tensors(path).stored), LAYOUT, wanted)
    expected = flatten_dict(params(), sep="/")
    structs = flatten_dict(wanted, sep="/")
    held = {}
    for name, leaf in flatten_dict(loaded, sep="/").items():
        assert leaf.sharding.is_equivalent_to(structs[name].sharding, leaf.ndim), name
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data, np.float32), expected[name][shard.index], err_msg=name)
            held[name, str(shard.index)] = shard.data.size
    # Scalars, and what NumPy joins, are no views and not counted.
    counted = {key: size for key, size in held.items() if not key[0].startswith(("temperature", "mod/"))}
    assert CountingArray.read == sum(counted.values())


def start(path, devices, *process):
    code = f"from tests.weights.test_load import *; start_process(Path({str(path)!r}), *{process})"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def start_process(path, *process):
    """One process of the run: alone, or the number `process[0]` of two that meet at the port `process[1]`."""
    if process:
        jax.distributed.initialize(f"127.0.0.1:{process[1]}", num_processes=2, process_id=process[0])
    load_and_compare(path)


def assert_all_succeed(*processes):
    for process in processes:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors


def test_sharded_over_eight_devices(tmp_path):
    files = save(tmp_path, published(params()))
    assert_all_succeed(start(files.path, 8))


def test_sharded_over_two_processes(tmp_path):
    files = save(tmp_path, published(params()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert_all_succeed(*(start(files.path, 2, number, port) for number in range(2)))
