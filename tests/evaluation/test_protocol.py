"""How an evaluation was made."""

import hashlib
import json
from types import SimpleNamespace

import pytest

from egrpo_jax.common.config import to_config_dict
from egrpo_jax.common.errors import UserError
from egrpo_jax.evaluation import protocol
from egrpo_jax.pipelines import ModelConfig
from egrpo_jax.rewards.config import HpsConfig, RemoteConfig, ScorersConfig
from egrpo_jax.run.workdir import record_config
from egrpo_jax.training.config import RewardsConfig, TrainConfig


def test_hash_is_that_of_a_text_file():
    described = protocol.describe_prompts("mine.txt", ["one", "zwölf"])
    assert described["sha256"] == hashlib.sha256("one\nzwölf\n".encode()).hexdigest()
    assert described["count"] == 2


def test_what_was_trained_on_is_what_the_run_says(tmp_path):
    config = TrainConfig(rewards=RewardsConfig(train=("emoji",)))
    assert protocol.training_rewards(config.rewards.train, None) == ("emoji",)
    record_config(tmp_path, {"rewards": {"train": ["emoji_weak"]}})
    assert protocol.training_rewards(config.rewards.train, tmp_path) == ("emoji_weak",)
    with pytest.raises(UserError, match=r"found no config\.json"):
        protocol.training_rewards(config.rewards.train, tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        protocol.training_rewards(config.rewards.train, tmp_path)
    (tmp_path / "config.json").write_text('{"rewards": 3}')
    with pytest.raises(UserError, match=r"config\.json has no rewards\.train"):
        protocol.training_rewards(config.rewards.train, tmp_path)


def test_a_model_is_described_by_what_it_has():
    about = {"guidance": 4.5, "lora_weights": None}
    described = protocol.describe_model(ModelConfig("published", path="org/model"), SimpleNamespace(about=about))
    assert described == {"name": "published", "path": "org/model", "guidance": 4.5}


def test_rewards_are_described_without_secrets():
    chat = RemoteConfig("http://host/v1?key=secret", api="chat", model="Judge-7B")
    scorers = ScorersConfig(hps=HpsConfig(path="hps.pt"), remote={"vlm": chat})
    assert protocol.describe_reward("imagereward", scorers).endswith(
        "(THUDM/ImageReward, google-bert/bert-base-uncased)"
    )
    assert protocol.describe_reward("vlm", scorers) == "at http://host/v1, API chat, Judge-7B"
    assert protocol.describe_reward("mine:reward", scorers) == "the user's own"
    assert "secret" not in json.dumps(protocol.public_config(to_config_dict(TrainConfig(scorers=scorers)).to_dict()))
