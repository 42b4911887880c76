"""Every number of every config states its range, and no value outside of it gets through."""

import dataclasses
import math
import types
import typing
from typing import Annotated

import numpy as np
import pytest

from egrpo_jax.common.config import from_config_dict, to_config_dict
from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Range, check
from egrpo_jax.pretraining.flow import FlowJob
from egrpo_jax.pretraining.loop import Optim
from egrpo_jax.pretraining.text import TextJob
from egrpo_jax.pretraining.towers import TowerJob
from egrpo_jax.rewards.config import RemoteConfig
from egrpo_jax.rl.algorithms.base import ALGORITHMS, Algorithm
from egrpo_jax.training.config import TrainConfig

OPTIM = Optim(steps=10, batch_size=4)
WITHOUT_DEFAULTS = {
    Optim: OPTIM,
    TowerJob: TowerJob("judge", "conv", 8, "weak", OPTIM),
    RemoteConfig: RemoteConfig("http://host"),
}
NONSENSE = (math.nan, math.inf, -math.inf, 1e30, -1e30, 1e-30, -1e-30, 2**64, 2**32, -(2**64), -1, -2, 0)


def parts(hint):
    """The types within a type: of a union, a tuple, a dict."""
    if typing.get_origin(hint) in (None, Annotated, typing.Literal):
        return [hint]
    return [part for arg in typing.get_args(hint) for part in parts(arg)]


def hints(cls):
    return typing.get_type_hints(cls, include_extras=True)


def algorithm(name):
    return Algorithm.variant({"algorithm": name})


def config_classes(*roots):
    """`roots` and all dataclasses in their fields."""
    found = {}
    for cls in roots:
        inner = [part for hint in hints(cls).values() for part in parts(hint) if dataclasses.is_dataclass(part)]
        found |= dict.fromkeys([cls, *config_classes(*inner)])
    return found


CLASSES = [
    cls
    for cls in config_classes(TrainConfig, TextJob, TowerJob, FlowJob, *map(algorithm, ALGORITHMS))
    if cls is not Algorithm  # of which there are these
]
NUMBERS = {
    f"{cls.__name__}.{name}": (cls, name, part)
    for cls in CLASSES
    for name, hint in hints(cls).items()
    for part in parts(hint)
    if (typing.get_args(part) or (part,))[0] in (int, float)
}


def test_the_reflection_sees_all():
    assert {"EGrpo.active_steps", "LoraOptions.alpha", "RemoteConfig.timeout", "Optim.lr"} < set(NUMBERS)
    assert {TrainConfig, RemoteConfig, Optim} < set(CLASSES)


@pytest.mark.parametrize("field", NUMBERS)
def test_every_number_states_its_range(field):
    kind, allowed = typing.get_args(NUMBERS[field][2])
    assert isinstance(allowed, Range)
    assert -math.inf < allowed.low < allowed.high < math.inf
    # float32 tells what lies at the ends from 0; an int32 counts.
    assert allowed.low == 0 or kind is int or abs(np.float32(allowed.low)) > 1e-30
    assert allowed.high < 2**31 or field.endswith(".seed")


@pytest.mark.parametrize("field", NUMBERS)
def test_no_nonsense_gets_through(field):
    cls, name, hint = NUMBERS[field]
    kind, allowed = typing.get_args(hint)
    base = WITHOUT_DEFAULTS.get(cls) or cls()
    in_a_tuple = any(typing.get_origin(option) is tuple for option in options(hints(cls)[name]))
    for value in NONSENSE:
        changes = {name: (value,) if in_a_tuple else value}
        inside = (allowed.low <= value <= allowed.high or value == allowed.also) and isinstance(value, kind | int)
        for make in (dataclasses.replace, from_dict):
            error = refusal(lambda make=make, changes=changes: make(base, **changes))
            if not inside:
                assert error is not None, (make, value)
                assert error.key.split("[")[0] == name
                assert "\n" not in str(error)


def options(hint):
    """The types of a union, or the type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else [hint]


def from_dict(base, **changes):
    return from_config_dict(type(base), to_config_dict(base).to_dict() | changes)


def refusal(make):
    """The ConfigError that `make` raises, if it does."""
    try:
        make()
    except ConfigError as error:
        return error
    return None


@dataclasses.dataclass(frozen=True)
class Example:
    rate: Annotated[float, Range(1e-3, 2)] = 1.0
    size: Annotated[int, Range(4, 12, multiple_of=4, also=-1, why="tiles are of four")] = 4
    pair: tuple[Annotated[int, Range(0, 5)], Annotated[float, Range(0, 1)]] = (0, 0.5)
    steps: tuple[Annotated[int, Range(0, 5)], ...] | None = None
    weights: dict[str, Annotated[float, Range(-1, 1)]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check(self)


@pytest.mark.parametrize(
    "changes",
    [
        *({"rate": rate} for rate in (1e-3, 2, 1.5, np.float32(1))),
        *({"size": size} for size in (4, 12, -1, np.int64(8))),
        {"pair": (5, 1.0), "steps": (0, 5), "weights": {"a": -1.0, "b": 1}},
        {"steps": ()},
    ],
)
def test_both_ends_belong_to_a_range(changes):
    Example(**changes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"rate": math.nan}, "config.rate: found nan, expected a number from 0.001 to 2"),
        ({"rate": np.float32(3)}, "config.rate: found np.float32(3.0), expected a number from 0.001 to 2"),
        ({"size": 6}, "config.size: found 6, expected a multiple of 4 from 4 to 12, or -1: tiles are of four"),
        ({"size": 8.0}, "config.size: found 8.0, expected a multiple of 4 from 4 to 12, or -1: tiles are of four"),
        ({"size": 0}, "config.size: found 0, expected a multiple of 4 from 4 to 12, or -1: tiles are of four"),
        ({"pair": (0, 2.0)}, "config.pair[1]: found 2.0, expected a number from 0 to 1"),
        ({"steps": (1, 6)}, "config.steps[1]: found 6, expected a whole number from 0 to 5"),
        ({"weights": {"a": 0.0, "b": 2.0}}, "config.weights.b: found 2.0, expected a number from -1 to 1"),
    ],
)
def test_a_refusal_names_the_key_and_the_range(changes, line):
    with pytest.raises(ConfigError) as error:
        Example(**changes)
    assert str(error.value) == line


def test_an_integer_that_no_float_holds_is_no_traceback():
    with pytest.raises(ConfigError, match=r"^config\.rate: found 1000+, expected a value of type float$"):
        from_config_dict(Example, {"rate": 10**400})
