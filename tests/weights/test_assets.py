import jax
import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.flux import FluxConfig
from egrpo_jax.weights.assets import asset_path, load_asset, load_text_encoder, load_tower, read_flow, save_asset

TREE = {"block": {"kernel": np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4), "bias": np.float32([1e-3])}}


def test_round_trip_goes_through_float16(tmp_path):
    path = tmp_path / "x.safetensors"
    save_asset(path, TREE, {"config": {"width": 4, "axes": (1, 2)}, "license": "CC BY-SA 4.0"})
    params, metadata = load_asset(path)
    assert jax.tree.structure(params) == jax.tree.structure(TREE)
    for value, original in zip(jax.tree.leaves(params), jax.tree.leaves(TREE), strict=True):
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, original.astype(np.float16).astype(np.float32))
    assert metadata == {"config": {"width": 4, "axes": [1, 2]}, "license": "CC BY-SA 4.0"}


def test_writing_replaces_whole_files_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_asset(path, TREE, {"run": 1})

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(UserError, match="No space left"):
        save_asset(path, TREE, {"run": 2})
    assert load_asset(path)[1] == {"run": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_missing_damaged_and_unwritable_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"none\.safetensors is missing; reinstall"):
        load_asset(tmp_path / "none.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not a file of tensors")
    with pytest.raises(UserError, match=r"damaged\.safetensors is no readable asset"):
        load_asset(damaged)
    with pytest.raises(UserError, match="cannot write"):
        save_asset(tmp_path / "no" / "folder.safetensors", TREE, {})


def test_embedded_models_load():
    model, params = load_text_encoder()
    assert params["tokens"]["embedding"].shape == (model.config.vocab_size, model.config.width)
    for name, kind in (("reward", "conv"), ("judge", "mixer"), ("weak", "conv")):
        tower, params = load_tower(name)
        assert tower.config.kind == kind
        assert params["text_head"]["kernel"].shape == (384, tower.config.embed_dim)
    flow = read_flow()
    assert isinstance(flow.config, FluxConfig)
    assert flow.grid == (32 // flow.patch, 32 // flow.patch)
    assert flow.params["final"]["kernel"].shape == (flow.config.width, flow.patch**2 * 3)


def test_embedded_files_are_small_and_name_their_licence():
    folder = asset_path(".").resolve()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
    for file in folder.glob("*.safetensors"):
        licence = load_asset(file)[1]["license"]
        assert "Apache-2.0" in licence or "CC BY-SA 4.0" in licence
    assert "OpenMoji" in (folder / "LICENSE.md").read_text()


@pytest.mark.parametrize("config", [None, 3, {}, {"width": 4}, {"axes_dims": 3}])
def test_files_of_another_kind_of_model_are_user_errors(tmp_path, config):
    metadata = {} if config is None else {"config": config}
    for name, load in (
        ("flow", lambda: read_flow(tmp_path / "flow.safetensors")),
        ("text_encoder", lambda: load_text_encoder(tmp_path)),
        ("judge", lambda: load_tower("judge", tmp_path)),
    ):
        save_asset(tmp_path / f"{name}.safetensors", TREE, metadata)
        with pytest.raises(UserError, match=rf"^\S+/{name}\.safetensors does not describe a [^\n]+; reinstall [^\n]+$"):
            load()
