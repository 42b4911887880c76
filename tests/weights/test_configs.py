"""config.json of a model's folder: what is said of it, and one line for what is wrong with it."""

import json
import math
import re

import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.weights.configs import (
    EVEN,
    FLAG,
    LARGEST,
    NUMBER,
    POSITIVE,
    SIZE,
    TOKEN_ID,
    Key,
    Published,
    list_of,
    nullable,
    one_of,
    read_config,
)

KEYS = {
    "num_layers": Key(SIZE, 19), "guidance_embeds": Key(FLAG, False), "scale": Key(POSITIVE, 0.5),
    "axes": Key(list_of(EVEN, 3), (16, 56, 56)), "out_channels": Key(nullable(SIZE), None),
}  # fmt: skip


def write(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_is_absent_has_its_default(tmp_path):
    folder = write(tmp_path, _class_name="Flux", _name_or_path="x", num_layers=3, scale=2, axes=[2, 4, 6])
    expected = {"num_layers": 3, "guidance_embeds": False, "scale": 2, "axes": [2, 4, 6], "out_channels": None}
    assert read_config(folder, "Flux").checked(KEYS, strict=True) == expected
    assert read_config(str(write(folder, _class_name="Flux", out_channels=64)), "Flux")["out_channels"] == 64


@pytest.mark.parametrize("name", ["T5EncoderModel", "t5"])
def test_keys_beyond_the_table(tmp_path, name):
    folder = write(tmp_path, architectures=["T5EncoderModel"], model_type="t5", d_model=8, use_cache=True)
    assert read_config(folder, name).checked({"d_model": Key(SIZE)}) == {"d_model": 8}
    with pytest.raises(UserError, match=r"config\.json: unknown architectures, model_type, use_cache; .* has d_model$"):
        read_config(folder, name).checked({"d_model": Key(SIZE)}, strict=True)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"_class_name": "SD3Transformer2DModel", "num_layers": 24}, "a SD3Transformer2DModel"),
        ({"architectures": ["CLIPModel"], "model_type": "clip"}, "a CLIPModel"),
        ({"architectures": None, "model_type": "clip"}, "a clip"),
        ({"num_layers": 19}, "no model that it names"),
    ],
)
def test_a_folder_of_another_model(tmp_path, config, found):
    folder = write(tmp_path, **config)
    message = rf"^{re.escape(str(folder))}/config\.json is of {found}; must be of a FluxTransformer2DModel$"
    with pytest.raises(UserError, match=message):
        read_config(folder, "FluxTransformer2DModel")


@pytest.mark.parametrize(
    ("kind", "fitting", "others"),
    [
        (SIZE, [1, LARGEST], [0, -1, LARGEST + 1, 2.0, "1", True, None, [1], 10**400]),
        (EVEN, [2], [3, 0, 2.5]),
        (TOKEN_ID, [0, 2], [-1, [2], None, False, 2.0]),
        (NUMBER, [-1, 0.5, 0], [math.nan, math.inf, -math.inf, 10**400, "0.5", True, None]),
        (POSITIVE, [1, 1e-9], [0, -0.0, -1, math.nan, math.inf, None]),
        (FLAG, [True, False], [0, 1, "true", None]),
        (one_of("silu", None), ["silu", None], ["gelu", 0, False]),
        (one_of(1, False), [1, False], [True, 0]),
        (nullable(SIZE), [None, 3], [0, "3"]),
        (list_of(SIZE), [[1], [1, 2]], [[], [1, 0], 1, "1", {"1": 1}, None]),
        (list_of(EVEN, 3), [[2, 4, 6]], [[2, 4], [2, 4, 5], [2, 4, 6, 8], []]),
    ],
)
def test_kinds_of_values(tmp_path, kind, fitting, others):
    for value in fitting:
        assert read_config(write(tmp_path, _class_name="X", key=value), "X").checked({"key": Key(kind)})["key"] == value
    for value in others:
        published = read_config(write(tmp_path, _class_name="X", key=value), "X")
        with pytest.raises(UserError, match=r"^\S+/config\.json: key is [^\n]+; must be [^\n]+$") as caught:
            published.checked({"key": Key(kind)})
        assert str(caught.value).endswith(f"must be {kind.expected}")
        assert len(str(caught.value)) < 150 + len(str(tmp_path)) + len(kind.expected)


def test_a_key_that_must_be_there():
    for default in ({}, {"default": True}):
        with pytest.raises(UserError, match=r"^config\.json: key is (missing|true); must be false$"):
            Published({}).checked({"key": Key(one_of(False), **default)})


def test_sections():
    whole = Published({"text": {"size": 0}, "vision": None, "other": [3]}, "x.json")
    assert whole.section("vision") == whole.section("absent") == {}
    with pytest.raises(UserError, match=r"^x\.json: text\.size is 0; must be a positive integer$"):
        whole.section("text").checked({"size": Key(SIZE)})
    with pytest.raises(UserError, match=r"^x\.json: text\.deep\.er is missing; "):
        Published({"deep": {}}, "x.json", "text.").section("deep").checked({"er": Key(SIZE)})
    with pytest.raises(UserError, match=r"^x\.json: other is \[3\]; must be an object$"):
        whole.section("other")


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(UserError, match=r"^\S+config\.json is missing; give a model's folder, whole, [^\n]+$"):
        read_config(tmp_path, "Flux")
    for content in (b'{"a": 1', b"\xff\xfe", b"", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"^\S+config\.json is not JSON \([^\n]+\); download it again$"):
            read_config(tmp_path, "Flux")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json holds a JSON list; must be an object"):
        read_config(tmp_path, "Flux")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match=r"^cannot read \S+config\.json: Is a directory$"):
        read_config(tmp_path, "Flux")
