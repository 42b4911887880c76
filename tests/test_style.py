"""The house's measures: short functions, short files, public docstrings that begin with what a thing is or does."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("egrpo_jax", "examples") for path in (ROOT / folder).rglob("*.py"))
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def nodes(path):
    return ast.walk(ast.parse(path.read_text()))


def lengths():
    return {
        f"{path.stem}.{node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in nodes(path)
        if isinstance(node, FUNCTIONS)
    }


def public(path):
    """Names and docstrings of a module, and of its public classes, methods and functions."""
    module = ast.parse(path.read_text())
    yield path.stem, ast.get_docstring(module)
    bodies = [module, *(node for node in module.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
    for body in bodies:
        for node in body.body:
            if isinstance(node, FUNCTIONS | ast.ClassDef) and node.name[0] != "_":
                yield f"{path.stem}.{node.name}", ast.get_docstring(node)


def test_functions_are_short():
    found = lengths()
    assert np.percentile(list(found.values()), 90) <= 20
    assert {name: length for name, length in found.items() if length > 60} == {}


def test_files_are_short():
    assert [path for path in FILES if len(path.read_text().splitlines()) > 400] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_public_says_what_it_is_or_does(path):
    for name, text in public(path):
        assert text, name
        assert not re.match(r"(What|Which|Where|How|When|Why|Who|Whose|Whether)\b", text), name


def test_there_are_enough_tests():
    lines = lambda files: sum(len(path.read_text().splitlines()) for path in files)
    assert lines((ROOT / "tests").rglob("*.py")) >= 0.8 * lines(FILES)
