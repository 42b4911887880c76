"""Low-rank adapters (LoRA, arXiv:2106.09685), added to a model from outside.

A dense layer `y = x W + b` becomes `y = x W + b + (alpha / r) (x A) B`, with `A [in, r]` and `B [r, out]` in a variable
collection `lora` of their own. The model knows nothing of it: `intercept_methods` adds the second term to the output of
every layer that has adapters. The paths of its parameters stay as they are, and the model without the collection is
the base model, which is the reference policy.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.common.ranges import Range, check

Params = dict[str, Any]

COLLECTION = "lora"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Choice of the layers that are adapted, and of their adapters' size.

    Attributes:
      targets: regular expressions; a dense layer is adapted if one is found in its path, as `double_blocks/image_out`.
      rank: r, of each adapter.
      alpha: the adapter's output is multiplied by `alpha / rank`.
    """

    targets: tuple[str, ...]
    rank: Annotated[int, Range(1, 100_000)] = 64
    alpha: Annotated[float, Range(1e-3, 10**6)] = 128.0

    def __post_init__(self) -> None:
        check(self)
        if not self.targets:
            raise ConfigError("targets", self.targets, "at least one regular expression")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError("targets", pattern, f"a regular expression ({error})") from None

    @property
    def scale(self) -> float:
        """Factor of an adapter's output."""
        return self.alpha / self.rank


def adapted_layers(params: Mapping[str, Any], targets: tuple[str, ...]) -> tuple[str, ...]:
    """Paths, joined with '/' and sorted, of the dense layers of `params` in which one of `targets` is found.

    Raises:
      UserError: a target is found in none.
    """
    paths = sorted(path.removesuffix("/kernel") for path in flatten_dict(params, sep="/") if path.endswith("/kernel"))
    for pattern in targets:
        if not any(re.search(pattern, path) for path in paths):
            raise UserError(f"LoRA target {pattern!r} is found in no dense layer's path; those are {', '.join(paths)}")
    return tuple(path for path in paths if any(re.search(pattern, path) for pattern in targets))


def init_lora(key: chex.PRNGKey, params: Mapping[str, Any], config: LoraConfig) -> Params:
    """Fresh adapters, which change nothing: A normal with standard deviation `1 / rank`, B zero (as PEFT's "gaussian").

    Args:
      key: of A.
      params: the base model's parameters, or their `jax.ShapeDtypeStruct`; only shapes are looked at.
      config: which layers are adapted.

    Returns:
      `{"a": [..., in, rank], "b": [..., rank, out]}`, float32, at the path of each adapted layer, whose kernel is
      `[..., in, out]`: leading axes, of a scanned stack of layers, stay.

    Raises:
      UserError: a target is found in no layer's path.
    """
    flat = flatten_dict(params, sep="/")
    paths = adapted_layers(params, config.targets)
    lora = {}
    for path, layer_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
        *stack, inputs, outputs = flat[f"{path}/kernel"].shape
        lora[f"{path}/a"] = jax.random.normal(layer_key, (*stack, inputs, config.rank), jnp.float32) / config.rank
        lora[f"{path}/b"] = jnp.zeros((*stack, config.rank, outputs), jnp.float32)
    return unflatten_dict(lora, sep="/")


def low_rank(x: chex.Array, a: chex.Array, b: chex.Array, scale: float, dtype: Any) -> chex.Array:
    """`scale * (x A) B`, `[..., in]` to `[..., out]`, computed in `dtype`."""
    x, a, b = (jnp.asarray(array, dtype) for array in (x, a, b))
    return (x @ a) * scale @ b


def lora_interceptor(scale: float) -> Callable[..., Any]:
    """Makes an interceptor for `flax.linen.intercept_methods`: it adds the adapter's output where a module has one."""
    called: list[nn.Module] = []

    def interceptor(next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        # A layer that calls the layer it inherits from comes by twice; the adapter belongs to the outer call.
        inner = any(module is outer for outer in called)
        if inner or context.method_name != "__call__" or not module.has_variable(COLLECTION, "a"):
            return next_fun(*args, **kwargs)
        called.append(module)
        try:
            output = next_fun(*args, **kwargs)
        finally:
            called.pop()
        # As Flax does with parameters: they may come in boxes that gather them.
        a, b = nn.meta.unbox([module.get_variable(COLLECTION, name) for name in ("a", "b")])
        return output + low_rank(args[0], a, b, scale, output.dtype)

    return interceptor


def apply_lora(model: nn.Module, variables: Mapping[str, Any], *args: Any, scale: float, **kwargs: Any) -> Any:
    """`model.apply(variables, *args, **kwargs)` with the adapters of `variables["lora"]`.

    Without that collection it is the base model, bit for bit. Stacks under `nn.scan` must list the collection in
    `variable_axes`.
    """
    with nn.intercept_methods(lora_interceptor(scale)):
        return model.apply(variables, *args, **kwargs)


def merge_lora(params: Mapping[str, Any], lora: Mapping[str, Any], scale: float) -> Params:
    """The parameters of a base model that computes what `params` with adapters `lora` do; float32 inside."""
    flat, adapters = flatten_dict(params, sep="/"), flatten_dict(lora, sep="/")
    for path in (name.removesuffix("/a") for name in adapters if name.endswith("/a")):
        kernel = flat[f"{path}/kernel"]
        change = jnp.matmul(adapters[f"{path}/a"], adapters[f"{path}/b"], precision="highest")
        flat[f"{path}/kernel"] = (kernel.astype(jnp.float32) + scale * change).astype(kernel.dtype)
    return unflatten_dict(flat, sep="/")
