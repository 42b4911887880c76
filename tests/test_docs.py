"""What the documents say, where a machine can check it."""

import ast
import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from absl import flags
from ml_collections import config_flags

from docs import make_config
from egrpo_jax.cli.overrides import read_none
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.pretrain import PROGRAMS as JOBS
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.plan import describe
from egrpo_jax.training.config import TrainConfig
from tests import programs
from tests.test_imports import PACKAGE, ROOMS

CLASSES = [cls for _, cls in make_config.sections(TrainConfig)] + list(make_config.JOBS.values())
KEYS = {prefix + field.name for prefix, cls in make_config.sections(TrainConfig) for field in dataclasses.fields(cls)}
SECTIONS = sorted({key.split(".")[0] for key in KEYS if "." in key})
read_none()
README = (programs.ROOT / "README.md").read_text()
DOCUMENTS = {path: path.read_text() for path in [programs.ROOT / "README.md", *programs.ROOT.glob("docs/**/*.md")]}
ARCHITECTURE = DOCUMENTS[programs.ROOT / "docs/architecture.md"]


def docstrings():
    for path in [*programs.ROOT.glob("configs/**/*.py"), *PACKAGE.glob("*.py")]:
        yield ast.get_docstring(ast.parse(path.read_text())) or ""


def commands():
    """Every command of the documents and of the docstrings of programs and configs that has arguments."""
    for text in [*DOCUMENTS.values(), *docstrings()]:
        lines = re.sub(r"\\\n *", "", text)
        spans = re.sub(r"`(python -m [^`\n]+)\n([^`\n]+)`", r"`\1 \2`", lines)  # a line may end within one
        for command in re.findall(r"python -m egrpo_jax\.(\w+ +--[^`\n]*)", spans):
            yield re.split(r" {2,}[(#]", command)[0].strip()


def launches():
    """Every command of the documents that calls a script of launch/ with arguments."""
    for text in DOCUMENTS.values():
        lines = re.sub(r"\\\n *", "", text)
        for command in re.findall(r"^(?:.*`)?(launch/\w+\.sh (?:\w+ )?--[^`\n]*)", lines, re.M):
            yield command.strip()


def flags_of(program):
    """A program's flags as they are at its start."""
    return importlib.reload(importlib.import_module(f"egrpo_jax.{program}")).FLAGS


def rows(heading, text):
    """The cells of the table below a heading."""
    part = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in re.findall(r"^\|.*\|$", part, re.M)][2:]


def code(cell):
    return re.findall("`([^`]+)`", cell)


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


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_have_flags_configs_and_keys_that_there_are(command, monkeypatch):
    program, *arguments = shlex.split(command, comments=True)
    monkeypatch.chdir(programs.ROOT)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    values = flags_of(program)
    assert values(sys.argv) == [program]
    config = values["config"].value
    if config is not None:
        from_config_dict(JOBS[config.kind].job if program == "pretrain" else TrainConfig, config)


@pytest.mark.parametrize("command", sorted(set(launches())))
def test_launch_commands_have_flags_and_configs_that_there_are(command):
    words = [*shlex.split(command, comments=True), "--dry_run"]
    done = subprocess.run(words, cwd=programs.ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_config_keys_are_called_by_their_names():
    jobs = {field.name for cls in make_config.JOBS.values() for field in dataclasses.fields(cls)}
    for document, text in DOCUMENTS.items():
        if document != make_config.FILE:
            named = re.findall(rf"(?:`|\bconfig\.)((?:{'|'.join(SECTIONS)})(?:\.\w+)+)", text)
            assert {key for key in named if not key.endswith(".safetensors")} <= KEYS, document
            assert set(re.findall(r"--config\.([\w.]*\w)", text)) <= KEYS | jobs, document


def test_the_flags_of_evaluate_and_sample_are_listed():
    text = DOCUMENTS[programs.ROOT / "docs/evaluation.md"]
    first_cells = re.findall(r"^\| (`--[^|]+) \|", text, re.M)
    listed = {flag.removeprefix("--") for cell in first_cells for flag in code(cell)}
    left_out = {"rewards", "samples", "diversity"}
    assert "`sample` has the same flags but `--rewards`, `--samples` and `--diversity`" in text
    for program, expected in (("evaluate", listed), ("sample", listed - left_out)):
        assert set(flags_of(program)) == expected


def test_extras_are_those_that_can_be_installed():
    extras = set(tomllib.loads((programs.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for document, text in DOCUMENTS.items():
        named = re.findall(r"(?:egrpo_jax|'\.)\[([\w,]+)\]", text)
        assert set(",".join(named).split(",")) - {""} <= extras, document
    assert {extra for cell, _ in rows("Installing", README) for extra in code(cell)} == extras


def test_the_readmes_plan_is_the_papers():
    lines = describe(EGrpo().make_plan()).splitlines()
    for line in (*lines[:4], lines[-1]):
        assert line in README


def test_the_table_of_rooms_is_the_rule_that_is_tested():
    table = rows("Rooms, and who may import whom", ARCHITECTURE)
    assert {code(room)[0].strip("/"): " ".join(code(allowed)) for room, _, allowed in table} == ROOMS


def test_the_walk_names_files_and_what_is_in_them():
    for file, called, _ in rows("From a prompt to an update", ARCHITECTURE):
        if file:
            defined = {getattr(node, "name", None) for node in ast.parse((PACKAGE / code(file)[0]).read_text()).body}
            assert set(code(called)) <= defined, file


def test_every_file_of_code_that_is_named_is_there():
    for document, text in DOCUMENTS.items():
        for name in re.findall(r"(?:`|python )([\w/]+\.py)\b", text):
            assert any((root / name).exists() for root in (PACKAGE, programs.ROOT)), (document, name)


def test_every_link_leads_somewhere():
    for document, text in DOCUMENTS.items():
        for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", text):
            link = "".join(target)
            if "://" not in link:
                file, _, anchor = link.partition("#")
                assert (document.parent / file).exists(), (document, link)
                assert not anchor or anchor in anchors((document.parent / file if file else document).read_text())


def anchors(text):
    """What GitHub makes of the headings."""
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall("^#+ (.*)", text, re.M)]


def test_the_assets_are_small_and_credited():
    assets = programs.ROOT / "egrpo_jax" / "assets"
    assert sum(path.stat().st_size for path in assets.iterdir()) <= 20e6
    licence = (assets / "LICENSE.md").read_text()
    assert "OpenMoji" in licence
    assert "CC BY-SA 4.0" in licence
