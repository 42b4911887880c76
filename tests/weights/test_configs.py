"""config.json of a model's folder: what is said of it, and one line for what is wrong with it."""

import json
import re

import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.weights.configs import read_config

KNOWN = {
    "num_layers": 19, "guidance_embeds": False, "scale": 0.5, "act": "silu", "axes": (16, 56, 56), "channels": [128],
    "out_channels": None,
}  # fmt: skip


def write(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_diffusers_config_with_defaults_for_what_is_absent(tmp_path):
    folder = write(
        tmp_path, _class_name="Flux", _diffusers_version="0.30", _name_or_path="x", num_layers=3, scale=2, axes=[1, 2]
    )
    expected = KNOWN | {"num_layers": 3, "scale": 2, "axes": [1, 2]}
    assert read_config(folder, "Flux", KNOWN) == expected
    assert read_config(str(write(folder, _class_name="Flux", out_channels=64)), "Flux", KNOWN)["out_channels"] == 64


@pytest.mark.parametrize("name", ["T5EncoderModel", "t5"])
def test_transformers_config_as_it_is(tmp_path, name):
    config = {"architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 8, "use_cache": True}
    folder = write(tmp_path, **config, _name_or_path="google/t5")
    assert read_config(folder, name) == config


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"_class_name": "SD3Transformer2DModel", "num_layers": 24}, "a SD3Transformer2DModel"),
        ({"architectures": ["CLIPModel"], "model_type": "clip"}, "a CLIPModel"),
        ({"architectures": None, "model_type": "clip"}, "a clip"),
        ({"num_layers": 19}, "no model that it names"),
    ],
)
@pytest.mark.parametrize("known", [KNOWN, None])
def test_a_folder_of_another_model(tmp_path, config, found, known):
    folder = write(tmp_path, **config)
    message = rf"^{re.escape(str(folder))}/config\.json is of {found}; must be of a FluxTransformer2DModel$"
    with pytest.raises(UserError, match=message):
        read_config(folder, "FluxTransformer2DModel", known)


def test_unknown_keys_are_all_named_with_those_that_are_known(tmp_path):
    folder = write(tmp_path, _class_name="Flux", num_layer=3, quantization_config={})
    with pytest.raises(UserError, match=r"unknown num_layer, quantization_config; a Flux has num_layers, guidance"):
        read_config(folder, "Flux", KNOWN)


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("num_layers", "19", "int"),
        ("num_layers", 19.5, "int"),
        ("num_layers", True, "int"),
        ("num_layers", None, "int"),
        ("guidance_embeds", 1, "bool"),
        ("scale", "0.5", "float"),
        ("scale", True, "float"),
        ("act", 3, "str"),
        ("axes", 16, "tuple"),
        ("axes", [16, "56"], "tuple"),
        ("channels", {"0": 128}, "list"),
    ],
)
def test_values_of_another_type(tmp_path, key, value, kind):
    folder = write(tmp_path, **{"_class_name": "Flux", key: value})
    with pytest.raises(UserError, match=rf"config\.json: {key} is {re.escape(repr(value))}; must be .*{kind}"):
        read_config(folder, "Flux", KNOWN)


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(UserError, match=r"^\S+config\.json is missing; give a model's folder, whole, [^\n]+$"):
        read_config(tmp_path, "Flux", KNOWN)
    for content in (b'{"a": 1', b"\xff\xfe", b""):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"^\S+config\.json is not JSON \([^\n]+\); download it again$"):
            read_config(tmp_path, "Flux", KNOWN)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json holds a JSON list; must be an object"):
        read_config(tmp_path, "Flux", KNOWN)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"^cannot read \S+config\.json: Is a directory$"):
        read_config(tmp_path, "Flux", KNOWN)
