import dataclasses
from typing import Literal

import ml_collections
import pytest

from egrpo_jax.common.config import from_config_dict, to_config_dict
from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self):
        if self.lr <= 0:
            raise ConfigError("lr", self.lr, "a positive number")


@dataclasses.dataclass(frozen=True)
class Scorer:
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Job:
    name: str
    optim: Optim = Optim()
    steps: int = 10
    resume: bool = True
    active: tuple[int, ...] = (0, 1)
    clip: float | None = None
    mode: Literal["fast", "small"] | None = None
    limit: Literal["none"] | int = "none"
    shape: tuple[int, ...] | None = None
    base: Optim | None = None
    weights: dict[str, float] = dataclasses.field(default_factory=lambda: {"hps": 1.0})
    scorers: dict[str, Scorer] = dataclasses.field(default_factory=lambda: {"clip": Scorer(0.5)})


def convert(**changes):
    return from_config_dict(Job, to_config_dict(Job("test")).to_dict() | changes)


@pytest.mark.parametrize(
    "job",
    [
        Job("a"),
        Job("b", Optim(1.0, (0.0, 0.5), "cosine"), 3, False, (), 2.0, "small", 7, (1, 2, 3), Optim(), {}, {}),
    ],
)
def test_round_trip(job):
    config = to_config_dict(job)
    assert from_config_dict(Job, config) == job
    assert from_config_dict(Job, config.to_dict()) == job
    assert to_config_dict(from_config_dict(Job, config)).to_dict() == config.to_dict()


def test_every_key_can_be_overridden_with_its_type():
    config = to_config_dict(Job("a"))
    types = {key: config.get_type(key) for key in ("clip", "mode", "shape", "base", "optim", "weights")}
    nested = ml_collections.ConfigDict
    assert types == {
        "clip": float, "mode": str, "shape": tuple, "base": nested, "optim": nested, "weights": nested,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name", "expected"),
    [
        ({"clip": 1}, "clip", 1.0),
        ({"active": [3, 4]}, "active", (3, 4)),
        ({"active": ()}, "active", ()),
        ({"weights": {"a": 2}}, "weights", {"a": 2.0}),
        ({"scorers": {"a": {"weight": 2}}}, "scorers", {"a": Scorer(2.0)}),
        ({"limit": 5}, "limit", 5),
        ({"mode": "fast"}, "mode", "fast"),
        ({"shape": [1]}, "shape", (1,)),
        ({"base": {"lr": 2}}, "base", Optim(2.0)),
    ],
)
def test_conversions_that_lose_nothing(changes, name, expected):
    found = getattr(convert(**changes), name)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nope": 1}, "config.nope: found 1, expected one of the keys active, base, clip, "),
        ({"optim": {"betas": (0.1,)}}, r"config.optim.betas: found \(0.1,\), expected a value of type tuple\[float, f"),
        ({"optim": {"l": 1.0}}, "config.optim.l: found 1.0, expected one of the keys betas, lr, schedule"),
        ({"optim": {"schedule": "step"}}, "config.optim.schedule: found 'step', expected one of 'constant', 'cosine'"),
        ({"optim": {"lr": 0}}, "config.optim.lr: found 0.0, expected a positive number"),
        ({"optim": 3}, "config.optim: found 3, expected a value of type Optim"),
        ({"base": {"lr": -1.0}}, "config.base.lr: found -1.0, expected a positive number"),
        ({"steps": True}, "config.steps: found True, expected a value of type int"),
        ({"steps": 1.0}, "config.steps: found 1.0, expected a value of type int"),
        ({"steps": None}, "config.steps: found None, expected a value of type int"),
        ({"resume": 1}, "config.resume: found 1, expected a value of type bool"),
        ({"clip": True}, r"config.clip: found True, expected a value of type float \| None"),
        ({"clip": "1"}, "config.clip: found '1', expected"),
        ({"active": (1, "x")}, r"config.active\[1\]: found 'x', expected a value of type int"),
        ({"active": 3}, r"config.active: found 3, expected a value of type tuple\[int, ...\]"),
        ({"limit": "some"}, "config.limit: found 'some', expected"),
        ({"weights": {"hps": "x"}}, "config.weights.hps: found 'x', expected a value of type float"),
        (
            {"scorers": {"clip": {"weights": 1}}},
            "config.scorers.clip.weights: found 1, expected one of the keys weight",
        ),
        ({"name": b"x"}, "config.name: found b'x', expected a value of type str"),
    ],
)
def test_the_wrong_key_is_named(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}") as error:
        convert(**changes)
    assert isinstance(error.value, UserError)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"^config.name: found nothing, expected a value of type str$"):
        from_config_dict(Job, {"steps": 3})


def test_literals_are_told_apart_by_type():
    @dataclasses.dataclass(frozen=True)
    class One:
        value: Literal[1, 2] = 1

    for value in (True, 1.0):
        with pytest.raises(ConfigError, match="expected one of 1, 2"):
            from_config_dict(One, {"value": value})


def test_no_key_of_training_hides_behind_a_method_of_config_dict():
    """`config.update.x` would reach the method `update`, and could not be overridden."""
    methods = set(dir(ml_collections.ConfigDict()))

    def keys(config):
        for field in dataclasses.fields(config):
            yield field.name
            if dataclasses.is_dataclass(value := getattr(config, field.name)):
                yield from keys(value)

    assert not methods & set(keys(TrainConfig()))
