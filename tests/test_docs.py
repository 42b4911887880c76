"""What the documents say, where a machine can check it."""

import dataclasses
import re

import numpy as np

from egrpo_jax.rl.plan import PlanConfig, describe, make_plan
from egrpo_jax.training.config import TrainConfig
from tests import programs

README = (programs.ROOT / "README.md").read_text()


def keys(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from keys(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def test_the_readme_lists_every_key_with_its_default():
    listed = {}
    for row in re.findall(r"^\| (`.*) \|$", README, flags=re.M):
        names, defaults, _ = row.split(" | ")
        listed |= zip(re.findall(r"`([^`]+)`", names), re.findall(r"`([^`]+)`", defaults), strict=True)
    assert listed == {name: _written(value) for name, value in keys(TrainConfig())}


def _written(value):
    if isinstance(value, float) and 0 < value < 1e-3:
        return np.format_float_scientific(value, trim="-", exp_digits=1)
    return repr(value).replace("'", '"')


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
