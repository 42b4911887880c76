"""Tables of names of transformers that are published in two formats, and the tensors that they stand for in either.

`diffusers` is the layout of Hugging Face repositories; original single files join layers that read the same input, by
output rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from egrpo_jax.weights.layout import Entry, Layout, entry

Names = tuple[tuple[str, str, str], ...]
"""Ours, diffusers', the original. Where that joins several layers, ours and diffusers' are separated by spaces."""
Make = Callable[..., Layout]
"""The tensors of a layer, of its published name and our paths: `linear`, `kernel` or `scale`."""


def scale(name: str, path: str) -> Layout:
    """The scale `name` of a norm, ours at `path`; whole names, for the formats' differ in their last part."""
    return (entry(name, path),)


def tensors(names: Names, fmt: str, make: Make, folder: str = "", prefix: str = "") -> Iterator[Entry]:
    """All tensors of the layers `names`; `prefix` goes before published names, `folder` before our paths."""
    for ours, diffusers, original in names:
        paths = [folder + path for path in ours.split()]
        if fmt == "diffusers":
            for path, name in zip(paths, diffusers.split(), strict=True):
                yield from make(prefix + name, path)
        else:
            yield from make(prefix + original, *paths)
