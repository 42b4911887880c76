"""The same run on one device and on eight."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from tests import programs, tiny_flux, tiny_qwen, tiny_sd3

ROOT = Path(__file__).parent.parent.parent
MESHES = ((8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 1, 2))


def run(config, out, *axes):
    command = [sys.executable, "-m", "tests.parallel.run_iterations", config, str(out), *map(str, axes)]
    devices = int(np.prod(axes))
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "meshes"),
    [
        ("tests/toy.py@6x4", ((2, 2, 2),)),  # two of four share three prompts
        ("tests/toy.py:reuse@6x4", ((2, 2, 2),)),
        pytest.param("tests/toy.py", MESHES, marks=pytest.mark.mesh),
        pytest.param("tests/toy.py@1x12", ((8, 1, 1), (1, 8, 1)), marks=pytest.mark.mesh),  # eight share one prompt
        pytest.param("configs/emoji.py", MESHES, marks=pytest.mark.mesh),
    ],
)
def test_samples_and_parameters_after_three_updates_do_not_depend_on_the_devices(tmp_path, config, meshes):
    one = run(config, tmp_path / "one.npz", 1, 1, 1)
    again = run(config, tmp_path / "again.npz", 1, 1, 1)
    assert all((one[name] == again[name]).all() for name in one)  # a rerun is bit-identical
    for axes in meshes:
        assert_same(run(config, tmp_path / "several.npz", *axes), one)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize(
    "size",
    [  # four devices, of which two share each of three prompts
        "mix_grpo@6x4", "branch_grpo@6x4", "dance_grpo@6x4", "flow_grpo@6x4", "ada_grpo@6x4", "tempflow_grpo@6x3",
        "diffusion_nft@6x4", "v_grpo@6x4", "adaptive@6x4",
    ],
)  # fmt: skip
def test_no_algorithm_depends_on_the_devices(tmp_path, size):
    config = f"tests/toy.py:{size}"
    assert_same(run(config, tmp_path / "four.npz", 2, 2, 1), run(config, tmp_path / "one.npz", 1, 1, 1))


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize("variant", ["", ",lora", ",int8", ",offload"])
def test_flux_with_sharded_parameters(tmp_path, variant):
    folder = tiny_flux.write_pipeline(tmp_path / "pipeline")
    config = f"tests/tiny_flux.py:{folder}{variant}"
    assert_same(run(config, tmp_path / "eight.npz", 2, 2, 2), run(config, tmp_path / "one.npz", 1, 1, 1))


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize(
    ("write", "variant"),
    [
        (tiny_sd3.write_pipeline, ""),
        (tiny_sd3.write_pipeline, ",lora"),
        (tiny_qwen.write_flux2, ""),
        (tiny_qwen.write_flux2, ",lora"),
        (tiny_qwen.write_z_image, ""),
        (tiny_qwen.write_z_image, ",lora"),
    ],
)
def test_guided_families_with_sharded_parameters(tmp_path, write, variant):
    config = f"tests/tiny_flux.py:{write(tmp_path / 'pipeline')}{variant}"
    assert_same(run(config, tmp_path / "four.npz", 2, 2, 1), run(config, tmp_path / "one.npz", 1, 1, 1))


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize(("axes", "base"), [((8, 1, 1), ""), ((2, 2, 2), ""), ((2, 2, 2), ",int8")])
def test_ratio_is_one_in_bfloat16_until_the_parameters_move(tmp_path, axes, base):
    folder = tiny_flux.write_pipeline(tmp_path / "pipeline")
    found = run(f"tests/tiny_flux.py:{folder},bfloat16{base}", tmp_path / "eight.npz", *axes)
    assert found["ratio"] <= 1e-6


def test_meshes_that_do_not_fit_the_devices():
    assert make_mesh(MeshConfig()).shape == {"data": 1, "fsdp": 1, "tensor": 1}
    assert make_mesh(MeshConfig(data=1, tensor=-1)).shape["tensor"] == 1
    with pytest.raises(ConfigError, match="axes that multiply to the 1 devices here"):
        make_mesh(MeshConfig(fsdp=2))


@pytest.mark.parametrize(("changes", "key"), [({"fsdp": 0}, "fsdp"), ({"data": -1, "fsdp": -1}, "data")])
def test_wrong_configs_name_the_key(changes, key):
    with pytest.raises(ConfigError, match=rf"^config\.{key}: found "):
        MeshConfig(**changes)


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("JAX_PLATFORMS", "nosuch", "JAX finds no devices with {'JAX_PLATFORMS': 'nosuch'} (Unable to initialize"),
        ("JAX_NUM_CPU_DEVICES", "0", "JAX finds no devices with {'JAX_NUM_CPU_DEVICES': '0'} ("),
        ("JAX_ENABLE_X64", "1", "JAX_ENABLE_X64: found it set, expected it unset"),
    ],
)
def test_an_environment_without_devices_is_one_line(tmp_path, variable, value, line):
    environment = {name: text for name, text in os.environ.items() if not name.startswith("JAX_")} | {variable: value}
    command = programs.command("train", "--config=tests/toy.py", f"--workdir={tmp_path / 'run'}")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {line}")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.mesh
def test_a_checkpoint_of_one_layout_is_read_on_every_other_bit_for_bit():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-m", "tests.parallel.across_layouts"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
