"""Ranges of the numbers in a config: each field states its own, `check` refuses what lies outside.

    group_size: Annotated[int, Range(2, 100_000)] = 12

A range is wide: it keeps out what makes no sense (nan, infinity, a typing error of many digits), not what is unusual.
Both of its ends belong to it, and neither lies where float32 cannot tell a number from 0 or 1.
"""

from __future__ import annotations

import dataclasses
import numbers
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

from egrpo_jax.common.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may hold, as an annotation of its type.

    Attributes:
      low, high: the smallest and the largest.
      multiple_of: of which all are multiples.
      also: one number outside of them that has a meaning of its own.
      why: ends the sentence that refuses a number.
    """

    low: float
    high: float
    multiple_of: int = 1
    also: int | None = None
    why: str = ""

    def holds(self, value: Any, whole: bool) -> bool:
        """Tells if `value` lies within and, if `whole`, is an integer."""
        if whole and not isinstance(value, numbers.Integral):
            return False
        within = bool(self.low <= value <= self.high)  # nan is not
        return value == self.also or (within and (not whole or int(value) % self.multiple_of == 0))

    def describe(self, whole: bool) -> str:
        """The range in words."""
        kind = "a whole number" if whole else "a number"
        if self.multiple_of > 1:
            kind = f"a multiple of {self.multiple_of}"
        other = "" if self.also is None else f", or {self.also}"
        return f"{kind} from {self.low} to {self.high}{other}" + (self.why and f": {self.why}")


Seed = Annotated[int, Range(0, 2**32 - 1)]
"""JAX's keys take 32 bits of a seed: 2**32 would draw what 0 draws."""
Count = Annotated[int, Range(1, 10**9)]
CountOrZero = Annotated[int, Range(0, 10**9)]
"""What is counted fits an int32."""
Decay = Annotated[float, Range(0, 0.999999)]
"""Of an exponential moving average; much nearer to 1 is 1 in float32, and the average stands still."""
LearningRate = Annotated[float, Range(1e-12, 1)]
WeightDecay = Annotated[float, Range(0, 10)]
GradNorm = Annotated[float, Range(1e-9, 10**9)]
"""Where gradients are clipped; the upper end clips nothing."""
Shift = Annotated[float, Range(1e-3, 1000)]
"""Of a time grid; published models have 0.5 to 12."""


def check(config: Any) -> None:
    """Compares every number of the dataclass `config`, in tuples and dicts too, with the range that its field states.

    None is left alone, and so is a value of another type: `from_config_dict` finds it.

    Raises:
      ConfigError: for the first number outside.
    """
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        for key, value, whole, allowed in _numbers(hint, getattr(config, name), name):
            if not allowed.holds(value, whole):
                raise ConfigError(key, value, allowed.describe(whole))


def _numbers(hint: Any, value: Any, key: str) -> Iterator[tuple[str, Any, bool, Range]]:
    """The numbers in `value`, of the type `hint`: key, number, whether it is to be an integer, range."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated and isinstance(value, numbers.Real):
        yield key, value, args[0] is int, args[1]
    elif origin in (typing.Union, types.UnionType):
        for option in args:
            yield from _numbers(option, value, key)
    elif origin is tuple and isinstance(value, tuple):
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
        for index, (item_hint, item) in enumerate(zip(hints, value, strict=False)):
            yield from _numbers(item_hint, item, f"{key}[{index}]")
    elif origin is dict and isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(args[1], item, f"{key}.{name}")
