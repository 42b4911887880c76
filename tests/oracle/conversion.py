"""diffusers' own conversion of original single files, against ours."""

import numpy as np
import torch

from egrpo_jax.weights.layout import export_tensors


def check_conversion(convert, layout, original, config, params):
    """What diffusers makes of our tensors of the format `original` are those that we write for diffusers."""
    ours, theirs = (dict(export_tensors(layout(config, fmt), params)) for fmt in ("diffusers", original))
    converted = convert({name: torch.from_numpy(array.copy()) for name, array in theirs.items()})
    assert converted.keys() == ours.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(converted[name], array, err_msg=name)
