"""Exported folders as the safetensors library reads them; nothing is left of an export that fails."""

import errno
import json
import os
import re
import resource
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.flux import Flux, FluxConfig
from egrpo_jax.weights.configs import read_config
from egrpo_jax.weights.export import export_folder
from egrpo_jax.weights.files import open_tensors
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.load import load_params
from egrpo_jax.weights.published.flux import (
    CLASS_NAME,
    config_from_diffusers,
    config_to_diffusers,
    flux_layout,
)
from tests.weights.test_load import LAYOUT, params, published, template

CONFIG = {"_class_name": "Toy", "num_layers": 3}
SHAPES = published_shapes(LAYOUT, template())
ONE_LINE = r"^cannot write \S+out: [^\n]+; choose a folder that can be written, with room$"


def export(target, dtype=jnp.bfloat16, **kwargs):
    export_folder(target, export_tensors(LAYOUT, jax.device_put(params())), SHAPES, CONFIG, dtype, **kwargs)


def read(path):
    """Tensors and metadata, by the library."""
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, np.dtype(np.float16), "bfloat16"])
@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
def test_one_file_and_its_config(tmp_path, dtype, stem):
    export(tmp_path / "new" / "out", dtype, stem=stem)
    names = {path.name for path in (tmp_path / "new" / "out").iterdir()}
    assert names == {"config.json", f"{stem}.safetensors"}
    tensors, metadata = read(tmp_path / "new" / "out" / f"{stem}.safetensors")
    chex.assert_trees_all_equal(tensors, published(params(), jnp.dtype(dtype)))
    assert metadata == {"format": "pt"}
    assert json.loads((tmp_path / "new" / "out" / "config.json").read_text()) == CONFIG


def test_shards_with_an_index(tmp_path):
    limit = 300
    export(tmp_path / "out", max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    expected = published(params(), jnp.bfloat16)
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in expected.values())}
    assert list(index["weight_map"]) == list(SHAPES)
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"diffusion_pytorch_model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} == set(files)
    together = {}
    for file in files:
        tensors, metadata = read(tmp_path / "out" / file)
        assert metadata == {"format": "pt"}
        assert all(index["weight_map"][name] == file for name in tensors)
        # One tensor, conv.weight, is larger than the limit.
        assert sum(tensor.nbytes for tensor in tensors.values()) <= limit or list(tensors) == ["conv.weight"]
        together |= tensors
    chex.assert_trees_all_equal(together, expected)


@pytest.mark.parametrize("limit", [10**9, 300])
def test_what_is_exported_is_what_is_loaded(tmp_path, limit):
    export(tmp_path / "out", max_shard_bytes=limit)
    chex.assert_trees_all_equal(load_params(open_tensors(tmp_path / "out"), LAYOUT, template()), params())
    assert read_config(tmp_path / "out", "Toy") == CONFIG


def test_tensors_begin_aligned(tmp_path):
    export(tmp_path / "out")
    content = (tmp_path / "out" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_tensors_are_taken_one_after_another(tmp_path):
    """When a tensor is asked for, those before it are in the file."""
    nbytes = 4 * 2**20
    written = []

    def tensors():
        for name in "abc":
            files = list(tmp_path.glob(".*.tmp/*.safetensors"))
            written.append(files[0].stat().st_size if files else 0)
            yield name, np.zeros(nbytes // 4, np.float32)

    export_folder(tmp_path / "out", tensors(), dict.fromkeys("abc", (nbytes // 4,)), CONFIG, np.float32)
    assert written[1] >= nbytes
    assert written[2] >= 2 * nbytes


def test_an_existing_target_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"out exists; name a new folder, or remove it$"):
        export(tmp_path / "out")
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link exists"):
        export(tmp_path / "link")


def test_a_file_that_may_not_grow(tmp_path):
    """The system refuses the write half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(UserError, match=ONE_LINE):
            export(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["open", "mkdir", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_is_full_or_read_only(tmp_path, monkeypatch, step, code):
    genuine = getattr(Path, step)

    def refuse(path, *args, **kwargs):
        if ".tmp" in str(path) and (step != "open" or path.suffix == ".json"):  # last, after the weights
            raise OSError(code, os.strerror(code))
        return genuine(path, *args, **kwargs)

    monkeypatch.setattr(Path, step, refuse)
    with pytest.raises(UserError, match=ONE_LINE) as caught:
        export(tmp_path / "out")
    assert os.strerror(code) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_when_data_reach_it(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        export(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        export(tmp_path / "out")


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=ONE_LINE):
        export(tmp_path / "file" / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(tmp_path, error):
    def tensors():
        yield from list(export_tensors(LAYOUT, params()))[:5]
        raise error

    with pytest.raises(error):
        export_folder(tmp_path / "out", tensors(), SHAPES, CONFIG, np.float32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors[:-1], r"tensor none \(0,\) where h.2.bare (4, 2) was announced"),
        (lambda tensors: [*tensors, ("x", np.zeros(1))], "more tensors than the 24 shapes"),
        (lambda tensors: tensors[::-1], r"tensor h.2.bare (4, 2) where temperature () was announced"),
        (lambda tensors: [("temperature", np.zeros(1)), *tensors[1:]], "tensor temperature (1,) where temperature ()"),
    ],
)
def test_tensors_other_than_announced(tmp_path, change, message):
    tensors = change(list(export_tensors(LAYOUT, params())))
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\\", "")):
        export_folder(tmp_path / "out", tensors, SHAPES, CONFIG, np.float32)
    assert list(tmp_path.iterdir()) == []


FLUX = FluxConfig(
    in_channels=4, num_double_blocks=2, num_single_blocks=3, num_heads=2, head_dim=8, text_dim=6, pooled_dim=5,
    axes_dims=(2, 2, 4),
)  # fmt: skip


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
def test_diffusers_reads_what_we_wrote_and_we_read_what_it_wrote(tmp_path, shard):
    """A transformer saved by diffusers, loaded, exported, and loaded by diffusers again: the same numbers."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    names = config_to_diffusers(FLUX)
    theirs = diffusers.FluxTransformer2DModel(**{k: v for k, v in names.items() if not k.startswith("_")})
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    config = config_from_diffusers(read_config(tmp_path / "theirs", CLASS_NAME))
    assert config == FLUX

    inputs = (jnp.zeros((1, 1, 4)), jnp.zeros(1), jnp.zeros((1, 1, 6)), jnp.zeros((1, 5)), jnp.zeros(1))
    model = Flux(config, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, grid=(1, 1)))["params"]
    layout = flux_layout(config, "diffusers")
    loaded = load_params(open_tensors(tmp_path / "theirs"), layout, shapes)

    export_folder(
        tmp_path / "ours",
        export_tensors(layout, loaded),
        published_shapes(layout, shapes),
        config_to_diffusers(config),
        jnp.bfloat16,
        max_shard_bytes={"1GB": 10**9, "40KB": 40_000}[shard],
    )
    assert len(list((tmp_path / "ours").glob("*.index.json"))) == (shard == "40KB")
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "ours", torch_dtype=torch.bfloat16)
    assert again.config.items() >= {k: v for k, v in names.items() if not k.startswith("_")}.items()
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
