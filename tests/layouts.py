"""Whole models by their layouts, in host memory."""

import numpy as np
from flax.traverse_util import unflatten_dict

from egrpo_jax.weights.layout import leaf_rows, split_tensor


def import_tensors(layout, tensors, abstract):
    """Our tree of NumPy arrays, shaped like `abstract`, from all the tensors of `layout` in host memory."""
    flat = {}
    for e in layout:
        for leaf, array in split_tensor(e, tensors[e.name], leaf_rows(e, abstract)):
            flat.setdefault(leaf.path, {})[leaf.layer] = array
    return unflatten_dict(
        {
            path: layers[None] if None in layers else np.stack([layers[index] for index in range(len(layers))])
            for path, layers in flat.items()
        },
        sep="/",
    )
