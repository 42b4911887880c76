"""The section `rewards` as `credit` has it."""

import dataclasses
import functools
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.rewards import Scores
from egrpo_jax.rl.advantage import Credit, credit
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.training.config import RewardsConfig, TrainConfig
from egrpo_jax.training.iteration import assign_credit
from egrpo_jax.training.phases import _credit

CHOICES = {
    "combination": "sum",
    "mean_of": "prompt",
    "std_of": "all",
    "trim": 0.25,
    "absolute": 0.5,
    "best_of": 2,
}


@pytest.mark.parametrize("key", CHOICES)
def test_each_choice_of_the_config_arrives(key):
    chosen = {key: CHOICES[key]} | ({"std_of": "all"} if key == "mean_of" else {})
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(3, 2, 1, 8)).astype(np.float32) for name in ("a", "b")}
    came = np.ones((3, 2, 1, 8), bool)
    came[1, 1, 0, 5] = False
    scores = {"a": Scores(values["a"], came), "b": Scores(values["b"], np.ones_like(came))}
    config = RewardsConfig(train=("a", "b"), weights=(1.0, 3.0), **chosen)
    job = SimpleNamespace(config=SimpleNamespace(rewards=config), plan=EGrpo(num_steps=4, group_size=8).make_plan())
    got, left_out = assign_credit(SimpleNamespace(credit=functools.partial(_credit, job)), config, scores)

    arrays = {name: jnp.array(v) for name, v in values.items()}
    expected = credit(arrays, jnp.array(came), {"a": 1.0, "b": 3.0}, how=Credit(**chosen))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(got[1, 1], 0)
    assert left_out == 1
    assert abs(got - credit(arrays, jnp.array(came), {"a": 1.0, "b": 3.0})).max() > 0.01


def test_every_choice_is_a_key_with_the_same_default():
    assert {choice.name for choice in dataclasses.fields(Credit)} == set(CHOICES)
    for choice in dataclasses.fields(Credit):
        assert getattr(RewardsConfig(), choice.name) == choice.default


def test_a_plan_without_groups_is_not_asked_for_their_size():
    class OtherPlan:
        pass

    rewards = RewardsConfig(best_of=1000, trim=0.9)
    assert TrainConfig(plan=OtherPlan(), rewards=rewards).rewards.best_of == 1000
