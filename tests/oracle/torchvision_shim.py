"""torchvision beside PyTorch for the CPU: its compiled part is for CUDA, and what it registers is missed on import."""

import functools
import importlib.util


@functools.cache
def define_missing_operators():
    """Before torchvision, or what imports it, is imported; does nothing where it is not installed. Keep the result."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
