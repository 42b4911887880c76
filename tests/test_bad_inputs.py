"""What a wrong config is answered, alone or as a job: the lines of bad_inputs.txt, word for word."""

import ast
from pathlib import Path

import pytest

from egrpo_jax.common.config import from_config_dict, to_config_dict
from egrpo_jax.common.errors import UserError
from egrpo_jax.pretraining.flow import FlowJob
from egrpo_jax.pretraining.loop import Optim
from egrpo_jax.pretraining.text import TextJob
from egrpo_jax.pretraining.towers import TowerJob
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.training.job import Job

CONFIGS = {
    "train": TrainConfig(),
    "text": TextJob(),
    "tower": TowerJob("judge", "conv", 8, "weak", Optim(steps=10, batch_size=4)),
    "flow": FlowJob(),
}


def rows():
    """Program, overrides and line of each row."""
    program = ""
    for row in Path(__file__).with_name("bad_inputs.txt").read_text().splitlines():
        if row.startswith("["):
            program = row.strip("[]")
        elif row and not row.startswith("#"):
            yield (program, *row.split("  ->  "))


def value_of(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return float(text) if text in ("nan", "inf", "-inf") else text


def read(cls, config):
    """The config, and for a training run the job, which finds what does not go together."""
    found = from_config_dict(cls, config)
    if cls is TrainConfig:
        plan = found.plan.make_plan()
        Job(found, plan, pipeline=None, rewards={}, prompts=[], evaluation_prompts=[], optimizer=None)


@pytest.mark.parametrize(("program", "overrides", "line"), rows())
def test_bad_input(program, overrides, line):
    base = CONFIGS[program]
    config = to_config_dict(base).to_dict()
    for override in overrides.split("; "):
        path, _, text = override.partition("=")
        *parents, key = path.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        section[key] = value_of(text)
    with pytest.raises(UserError) as error:
        read(type(base), config)
    assert str(error.value) == line


def test_the_table_is_long_and_has_no_row_twice():
    inputs = [row[:2] for row in rows()]
    assert len(set(inputs)) == len(inputs) >= 60
