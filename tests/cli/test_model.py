"""Whose weights a program takes, and that they mean what the run says."""

import dataclasses
import json

import pytest
from absl import flags

from egrpo_jax.cli.model import ModelFlags, compare_weights, run_config
from egrpo_jax.common.config import to_config_dict
from egrpo_jax.common.errors import UserError
from egrpo_jax.pipelines import ModelConfig
from egrpo_jax.pipelines.published import LoraOptions
from egrpo_jax.pipelines.published.options import PublishedOptions
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.run.workdir import record_config
from egrpo_jax.training.config import TrainConfig

FLUX = PublishedOptions(lora=LoraOptions(rank=4, alpha=8.0), embeddings="embeddings", decode_batch=2)
RECORDED = TrainConfig(
    name="recorded", model=ModelConfig("published", "base", FLUX), learner=LearnerConfig(ema_decay=0.9), seed=7
)


def with_flux(**changes):
    return dataclasses.replace(RECORDED, model=ModelConfig("published", "base", dataclasses.replace(FLUX, **changes)))


@pytest.fixture
def workdir(tmp_path):
    record_config(tmp_path, to_config_dict(RECORDED).to_dict())
    return tmp_path


def model(*arguments):
    values = flags.FlagValues()
    chosen = ModelFlags(values)
    values(["program", *map(str, arguments)])
    return chosen


def test_the_runs_own_config_is_the_default(workdir):
    assert model(f"--workdir={workdir}").config() == RECORDED


def test_one_of_both_is_needed():
    with pytest.raises(UserError, match="expected --config with a config file, or --workdir with a training run"):
        model().config()


@pytest.mark.parametrize(
    ("given", "key", "was", "now"),
    [
        (with_flux(lora=LoraOptions(rank=4, alpha=80.0)), "model.published.lora.alpha", "8.0", "80.0"),
        (with_flux(lora=LoraOptions(rank=8, alpha=8.0)), "model.published.lora.rank", "4", "8"),
        (with_flux(truncate_time=True), "model.published.truncate_time", "False", "True"),
        (dataclasses.replace(RECORDED, model=ModelConfig()), "model.name", "'published'", "'emoji'"),
        (dataclasses.replace(RECORDED, learner=LearnerConfig()), "learner.ema_decay", "0.9", "None"),
    ],
)
def test_other_weights_are_refused_by_key_recorded_and_given_value(tmp_path, given, key, was, now):
    with pytest.raises(UserError) as error:
        compare_weights(tmp_path, RECORDED, given)
    message = str(error.value)
    assert message.startswith(f"config.{key} is {now}, but the run in {tmp_path} was trained with {was}, ")


def test_whether_there_are_adapters_is_told_as_one_key(tmp_path):
    with pytest.raises(UserError, match=r"config\.model\.published\.lora is None, but .* with {'alpha': 8\.0"):
        compare_weights(tmp_path, RECORDED, with_flux(lora=None))


def test_how_weights_are_used_is_free(tmp_path, capsys):
    changed = with_flux(
        height=64,
        width=64,
        guidance=1.0,
        embeddings=None,
        offload_encoders=True,
        decode_batch=8,
        remat="none",
        dtype="float32",
        int8_base=True,
    )
    compare_weights(tmp_path, RECORDED, dataclasses.replace(changed, name="other", seed=1))
    assert capsys.readouterr().err == ""


def test_a_base_that_lies_elsewhere_is_a_warning(tmp_path, capsys):
    compare_weights(tmp_path, RECORDED, dataclasses.replace(RECORDED, model=ModelConfig("published", "moved", FLUX)))
    assert capsys.readouterr().err == "warning: config.model.path is 'moved'; the run was trained from 'base'\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, r"found no config\.json in "),
        ("{", r"cannot read .*config\.json: "),
        ("[]", r"cannot read .*config\.json: found a list, expected the config of a training run"),
        ('{"nope": 1}', r".*config\.json: config\.nope: found 1"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, record, message):
    if record is not None:
        (tmp_path / "config.json").write_text(record)
    with pytest.raises(UserError, match=message):
        run_config(tmp_path)


def test_records_of_an_older_version_have_the_defaults_of_keys_that_came_since(workdir):
    record = json.loads((workdir / "config.json").read_text())
    del record["model"]["published"]["truncate_time"]
    (workdir / "config.json").write_text(json.dumps(record))
    assert run_config(workdir) == RECORDED
