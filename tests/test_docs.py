"""What the documents say, where a machine can check it."""

import dataclasses
import re
import shlex

import pytest
from absl import flags
from ml_collections import config_flags

from docs import make_config
from egrpo_jax.cli.overrides import read_none
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.rl.plan import PlanConfig, describe, make_plan
from egrpo_jax.training.config import TrainConfig
from tests import programs

CLASSES = [cls for _, cls in make_config.sections(TrainConfig)] + list(make_config.JOBS.values())
read_none()
README = (programs.ROOT / "README.md").read_text()


def test_the_list_of_config_keys_is_made_from_the_code():
    assert make_config.FILE.read_text() == make_config.document(), "run python -m docs.make_config"


@pytest.mark.parametrize("cls", CLASSES)
def test_every_key_is_described(cls):
    assert set(make_config.attributes(cls)) == {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("override", re.findall("`(--config[^`]+)`", make_config.INTRODUCTION))
def test_overrides_work_as_written(override):
    arguments = ["train", f"--config={programs.ROOT}/configs/emoji.py", *shlex.split(override)]
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments, lock_config=False)
    values(arguments)
    from_config_dict(TrainConfig, config.value)


def test_the_readmes_plan_is_the_papers():
    lines = describe(make_plan(PlanConfig())).splitlines()
    for line in (*lines[:4], lines[-1]):
        assert line in README


def test_every_link_to_a_file_leads_somewhere():
    for document in [programs.ROOT / "README.md", *(programs.ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), (document, target)


def test_the_assets_are_small_and_credited():
    assets = programs.ROOT / "egrpo_jax" / "assets"
    assert sum(path.stat().st_size for path in assets.iterdir()) <= 20e6
    licence = (assets / "LICENSE.md").read_text()
    assert "OpenMoji" in licence
    assert "CC BY-SA 4.0" in licence
