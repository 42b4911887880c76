"""Which parameters are sharded over which mesh axes: regular expressions on their paths."""

from __future__ import annotations

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from egrpo_jax.common.trees import path_name

Rules = tuple[tuple[str, PartitionSpec], ...]
"""(regular expression found in a parameter's path, joined with '/'; the layout of its **last** axes). The first rule
that fits counts; a parameter that no rule fits is replicated."""

INTO_TENSOR = PartitionSpec("fsdp", "tensor")
OUT_OF_TENSOR = PartitionSpec("tensor", "fsdp")

FLUX_RULES: Rules = (
    # Layers that read what is split over `tensor` (heads, hidden units) and write the residual stream.
    (r"(^|/)flow/.*(image_out|text_out|out|(_ff|_in)/linear_2)/kernel$", OUT_OF_TENSOR),
    (r"(^|/)t5/.*(out|mlp_out)/kernel$", OUT_OF_TENSOR),
    (r"(^|/)(flow|t5)/.*/kernel$", INTO_TENSOR),
    (r"(^|/)t5/tokens/embedding$", PartitionSpec("tensor", "fsdp")),
    # Adapters split the axis that they share with the layer they adapt.
    (r"(^|/)lora/.*/a$", PartitionSpec("fsdp", None)),
    (r"(^|/)lora/.*/b$", PartitionSpec(None, "fsdp")),
)
"""For FLUX.1's transformer and T5; CLIP and the VAE, 0.2 B parameters, are replicated. The moments of the optimizer and
averages lie as their parameters do."""


def sharding(mesh: Mesh, rules: Rules, path: str, shape: tuple[int, ...]) -> NamedSharding:
    """The layout of the parameter at `path`: an axis is split only where the mesh axis divides it."""
    spec = next((spec for pattern, spec in rules if re.search(pattern, path)), PartitionSpec())
    leading = len(shape) - len(spec)
    if leading < 0:
        raise ValueError(f"{path} of shape {shape} has fewer axes than its rule {spec}")
    axes = [
        axis if axis is not None and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape[leading:], strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, *axes))


def shardings(mesh: Mesh, rules: Rules, tree: Any) -> Any:
    """The layout of every leaf of `tree` (arrays, or `jax.ShapeDtypeStruct`)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding(mesh, rules, path_name(path), jax.numpy.shape(leaf)), tree
    )


def with_shardings(mesh: Mesh, rules: Rules, tree: Any) -> Any:
    """`tree` (arrays, or `jax.ShapeDtypeStruct`) as `jax.ShapeDtypeStruct`, each leaf with its layout."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        shardings(mesh, rules, tree),
    )


def lay_out(mesh: Mesh, rules: Rules, tree: Any) -> Any:
    """`tree` on the devices of `mesh`; arrays that lie there already are not copied."""
    return jax.device_put(tree, shardings(mesh, rules, tree))
