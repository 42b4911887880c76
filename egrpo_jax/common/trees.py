"""Parts of parameter trees, chosen by regular expressions on the paths of their leaves."""

from __future__ import annotations

import re
from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
    """A leaf's path as text: its keys, joined with '/'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def partition(tree: Any, pattern: str) -> tuple[Any, Any]:
    """The leaves in whose path `pattern` is found, and all others: two trees like `tree`, None in place of the others.

    JAX takes None for a tree without leaves, so that each part can be mapped, differentiated and saved by itself.
    """
    chosen = jax.tree_util.tree_map_with_path(lambda path, _: re.search(pattern, path_name(path)) is not None, tree)
    part = lambda wanted: jax.tree.map(lambda leaf, is_chosen: leaf if is_chosen == wanted else None, tree, chosen)
    return part(True), part(False)


def combine(part: Any, rest: Any) -> Any:
    """The tree that `partition` cut in two."""
    return jax.tree.map(lambda a, b: b if a is None else a, part, rest, is_leaf=lambda leaf: leaf is None)
