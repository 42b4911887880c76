"""The workdir and the record of its config."""

import json

import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.run.workdir import check_record, record_config, recorded_config

CONFIG = {"lr": 1e-4, "steps": (1, 2), "model": {"depth": 3, "lora": None}, "rewards": {}}


def claim(workdir, config, allow_change=False):
    """As a run does that nothing else refuses."""
    check_record(workdir, config, allow_change)
    record_config(workdir, config)


def test_claims_a_workdir(tmp_path):
    workdir = tmp_path / "a" / "b"
    claim(workdir, CONFIG)
    claim(workdir, CONFIG | {"steps": [1, 2]})
    assert json.loads((workdir / "config.json").read_text())["model"] == {"depth": 3, "lora": None}


def test_names_every_difference(tmp_path):
    claim(tmp_path, CONFIG)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    changed = {"lr": 1e-4, "steps": (1, 3), "model": {"depth": 4, "lora": None, "width": 8}, "rewards": {"hps": 1.0}}
    with pytest.raises(UserError) as error:
        claim(tmp_path, changed)
    message = str(error.value)
    for part in ("model.depth was 3, now 4", "model.width was nothing, now 8", "steps was [1, 2], now [1, 3]"):
        assert part in message
    assert "--allow_config_change" in message
    assert "another workdir" in message
    assert "\n" not in message
    assert "lr" not in message
    claim(tmp_path, changed, allow_change=True)
    claim(tmp_path, changed)


def test_one_and_true_and_none_are_different_configs(tmp_path):
    claim(tmp_path, {"a": 1, "b": None})
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(UserError, match="a was 1, now True; b was None, now nothing"):
        claim(tmp_path, {"a": True})


def test_workdirs_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/file/run/config.json"):
        claim(tmp_path / "file" / "run", CONFIG)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"cannot read {tmp_path}/config.json"):
        claim(tmp_path, CONFIG)


def test_a_run_that_has_saved_nothing_may_start_with_a_mended_config(tmp_path):
    claim(tmp_path, CONFIG)
    (tmp_path / "checkpoints").mkdir()
    claim(tmp_path, CONFIG | {"lr": 1.0})
    assert recorded_config(tmp_path)["lr"] == 1.0


@pytest.mark.parametrize("length", [255, 300])
def test_names_that_are_too_long_are_one_line(tmp_path, length):
    workdir = tmp_path / ("n" * length)
    if length <= 255:
        claim(workdir, CONFIG)
        return
    with pytest.raises(UserError, match="File name too long"):
        claim(workdir, CONFIG)


@pytest.mark.parametrize("record", ["{", "[]", "[" * 100_000, "\udcff"])
def test_a_damaged_record_is_named(tmp_path, record):
    (tmp_path / "config.json").write_bytes(record.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=f"cannot read {tmp_path}/config.json: "):
        recorded_config(tmp_path)
