"""What PEFT's configuration says of a LoRA file: scales stated by hand, and what is refused in a line."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from egrpo_jax.common.errors import UserError
from egrpo_jax.weights.lora import load_lora
from egrpo_jax.weights.lora_config import METADATA_KEY
from tests.weights.tiny_lora import LAYOUT, TO_Q, adapter, delta, template, write

A, B = (f"transformer.{TO_Q}.lora_{letter}.weight" for letter in "AB")


def load(path):
    return load_lora(path, 2.0, LAYOUT, template())


def prefixed(fields):
    return {f"transformer.{key}": value for key, value in fields.items()}


def write_peft(folder, config):
    """PEFT's folder."""
    tensors = {name.replace("transformer.", "base_model.model.", 1): tensor for name, tensor in adapter().items()}
    write(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def assert_scale(loaded, scale):
    tensors = adapter()
    np.testing.assert_allclose(delta(loaded), scale * (tensors[B] @ tensors[A]).T, rtol=1e-5)


SCALES = [
    ({"r": 2, "lora_alpha": 6}, 6 / 2),
    ({"r": 2}, 8 / 2),
    ({"r": 2, "lora_alpha": None, "alpha_pattern": None, "rank_pattern": None, "use_rslora": None}, 8 / 2),
    ({"lora_alpha": 6, "use_rslora": True}, 6 / np.sqrt(2)),
    ({"lora_alpha": 8, "alpha_pattern": {r"blocks\.1\.attn\.to_q": 6}}, 8 / 2),
    ({"lora_alpha": 8, "alpha_pattern": {r"1\.attn\.to_q": 6, "to_q": 4}}, 6 / 2),
    ({"r": 16, "lora_alpha": 6, "rank_pattern": {"to_k": 4, "attn.to_q": 2}}, 6 / 2),
    ({"r": 2, "lora_alpha": 6, "peft_type": "LORA", "init_lora_weights": "gaussian", "use_dora": False}, 6 / 2),
]


@pytest.mark.parametrize(("config", "scale"), SCALES)
def test_scales(tmp_path, config, scale):
    """In the metadata, with the prefix of a pipeline and without, and beside PEFT's file."""
    assert_scale(load(write(tmp_path / "a.safetensors", adapter(), **{METADATA_KEY: prefixed(config)})), scale)
    assert_scale(load(write(tmp_path / "b.safetensors", adapter(), **{METADATA_KEY: config})), scale)
    folder = write_peft(tmp_path / "peft", config)
    assert_scale(load(folder), scale)
    assert_scale(load(folder / "adapter_model.safetensors"), scale)


def test_what_is_said_of_text_encoders_is_not_of_the_transformer(tmp_path):
    config = {"text_encoder.lora_alpha": 32, "text_encoder.use_dora": True, "transformer.lora_alpha": 6}
    assert_scale(load(write(tmp_path / "x.safetensors", adapter(), **{METADATA_KEY: config})), 6 / 2)


def test_without_a_configuration_alpha_is_the_rank(tmp_path):
    """diffusers' rule; a configuration of PEFT beside a file of diffusers is not the file's."""
    folder = write_peft(tmp_path, {"r": 2, "lora_alpha": 6})
    assert_scale(load(write(folder / "x.safetensors", adapter())), 1)
    (folder / "adapter_config.json").unlink()
    assert_scale(load(folder / "adapter_model.safetensors"), 1)


REFUSED = [
    ({"lora_alpha": "8"}, "lora_alpha is '8', expected a positive number"),
    ({"lora_alpha": [8]}, r"lora_alpha is \[8\], expected a positive number"),
    ({"lora_alpha": True}, "lora_alpha is True, expected a positive number"),
    ({"lora_alpha": 0}, "lora_alpha is 0, expected a positive number"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf, expected a positive number"),
    ({"lora_alpha": 10**400}, "lora_alpha is 10+, expected a positive number"),
    ({"use_rslora": "no"}, "use_rslora is 'no', expected true or false"),
    ({"alpha_pattern": {"to_q(": 4}}, r"alpha_pattern has 'to_q\(', expected a regular expression"),
    ({"rank_pattern": {"*": 4}}, r"rank_pattern has '\*', expected a regular expression"),
    ({"alpha_pattern": {"to_q": None}}, "alpha_pattern to_q is None, expected a positive number"),
    ({"alpha_pattern": ["to_q"]}, r"alpha_pattern is \['to_q'\], expected an object"),
    ({"r": 4}, rf"the rank of {TO_Q} is 4, but its tensors have rank 2"),
    ({"r": 2, "rank_pattern": {"to_q": 4}}, rf"the rank of {TO_Q} is 4, but its tensors have rank 2"),
    ({"r": "two"}, "r is 'two', expected a positive number"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base model"),
    ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16', which changes"),
    ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the base model"),
    ({"use_dora": True}, "use_dora is True; only plain LoRA"),
    ({"peft_type": "LOHA"}, "peft_type is 'LOHA', expected LORA"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_configurations_that_are_refused(tmp_path, config, message):
    path = write(tmp_path / "x.safetensors", adapter(), **{METADATA_KEY: prefixed(config)})
    folder = write_peft(tmp_path / "peft", config)
    for source, place in ((path, f"{path}: metadata {METADATA_KEY}"), (folder, f"{folder / 'adapter_config.json'}")):
        with pytest.raises(UserError, match=rf"^{place}: {message}") as error:
            load(source)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_metadata_of_another_kind(tmp_path, text):
    path = tmp_path / "x.safetensors"
    save_file(adapter(), path, metadata={METADATA_KEY: text})
    with pytest.raises(UserError, match=r"metadata lora_adapter_metadata is .*expected a JSON object"):
        load(path)


@pytest.mark.parametrize("config", [{}, {"text_encoder.lora_alpha": 8}, {"lora_alpha": 8, "transformer.lora_alpha": 6}])
def test_metadata_that_is_not_clearly_of_the_transformer(tmp_path, config):
    path = write(tmp_path / "x.safetensors", adapter(), **{METADATA_KEY: config})
    with pytest.raises(UserError, match=r"metadata .*expected transformer\.lora_alpha and so on, or all without"):
        load(path)


def test_a_broken_file_beside_the_adapters(tmp_path):
    folder = write_peft(tmp_path, {})
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json is not JSON"):
        load(folder)


def test_alpha_said_twice_is_refused(tmp_path):
    tensors = adapter() | {f"transformer.{TO_Q}.alpha": np.array(4.0, np.float32)}
    path = write(tmp_path / "x.safetensors", tensors, **{METADATA_KEY: {"transformer.lora_alpha": 8}})
    with pytest.raises(UserError, match=rf"metadata {METADATA_KEY} and in {path}: .*alpha; expected only one"):
        load(path)
    folder = write_peft(tmp_path / "peft", {"lora_alpha": 8})
    peft = {name.replace("transformer.", "base_model.model.", 1): tensor for name, tensor in adapter().items()}
    write(folder / "adapter_model.safetensors", peft, **{METADATA_KEY: {"lora_alpha": 8}})
    with pytest.raises(UserError, match=r"alphas are both in .* and in .*adapter_config\.json"):
        load(folder)
