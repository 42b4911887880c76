"""Configs: ml_collections files for people, frozen dataclasses for the code.

Every program states its configuration as a tree of frozen dataclasses. A config file's `get_config(arg)` returns
`to_config_dict(...)` of it, so that every key exists and can be overridden on the command line;
`from_config_dict` turns the result back, and names the first key that is unknown, of a wrong type or out of range.
A dataclass with a method `variant` stands for several: it is asked which of them a section is.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from egrpo_jax.common.errors import ConfigError, under

T = TypeVar("T")


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """The dataclass tree `config` as a ConfigDict; a None of an optional field becomes a typed placeholder."""
    hints = typing.get_type_hints(type(config))
    result = ml_collections.ConfigDict()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        result[field.name] = config_dict.placeholder(_stored(hints[field.name])) if value is None else _plain(value)
    return result


def _plain(value: Any) -> Any:
    """`value` with dataclasses and mappings, at any depth of both, as ConfigDicts."""
    if dataclasses.is_dataclass(value):
        return to_config_dict(value)
    if isinstance(value, Mapping):
        return ml_collections.ConfigDict({key: _plain(item) for key, item in value.items()})
    return value


def _stored(hint: Any) -> type:
    """The type that a ConfigDict field of the optional type `hint` holds; of several, the first."""
    option = _options(hint)[0]
    if typing.get_origin(option) is typing.Literal:
        return type(typing.get_args(option)[0])
    origin = _origin(option)
    return ml_collections.ConfigDict if dataclasses.is_dataclass(origin) or origin is dict else origin


def from_config_dict(cls: type[T], config: ml_collections.ConfigDict | Mapping[str, Any], prefix: str = "") -> T:
    """The inverse of `to_config_dict`.

    Raises:
      ConfigError: for an unknown or missing key, a value of a wrong type, or, where a dataclass checks itself in
        `__post_init__`, a value that is out of range.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    keys = f"{cls.__name__}'s keys" if hasattr(cls, "variant") else "the keys"
    for key in config:
        if key not in fields:
            raise ConfigError(prefix + key, config[key], f"one of {keys} {', '.join(sorted(fields))}")
    values = {}
    for name, field in fields.items():
        if name in config:
            values[name] = _convert(hints[name], config[name], prefix + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(prefix + name, dataclasses.MISSING, _describe(hints[name]))
    with under(prefix):
        return cls(**values)


def _options(hint: Any) -> list[Any]:
    """The types of a union other than None; the type itself if it is no union."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for option in typing.get_args(hint) if option is not type(None)]
    return [hint]


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(map(repr, typing.get_args(hint)))}"
    return f"a value of type {_name(hint)}"


def _name(hint: Any) -> str:
    """The type as one would write it, without modules."""
    if hint is Ellipsis or hint is type(None):
        return "..." if hint is Ellipsis else "None"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_name, args))
    return f"{origin.__name__}[{', '.join(map(_name, args))}]" if args else hint.__name__


def _convert(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type `hint`, where that loses nothing."""
    if value in (None, (None,)) and type(None) in typing.get_args(hint):  # (None,): a tuple's on the command line
        return None
    for option in _options(hint):
        try:
            return _convert_plain(option, value, key)
        except (TypeError, OverflowError):  # OverflowError: an integer that no float holds
            continue
    raise ConfigError(key, value, _describe(hint))


def _convert_plain(hint: Any, value: Any, key: str) -> Any:
    """`value` as `hint`, which is no union. Raises TypeError if it is of another type."""
    origin, args = _origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
    elif isinstance(value, Mapping):
        if isinstance(origin, type) and dataclasses.is_dataclass(origin):
            with under(f"{key}."):
                chosen = origin.variant(value) if hasattr(origin, "variant") else origin
            return from_config_dict(chosen, value, prefix=f"{key}.")
        if origin is dict:
            return {name: _convert(args[1], item, f"{key}.{name}") for name, item in value.items()}
    elif origin is tuple and isinstance(value, tuple | list):
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(hints) == len(value):
            items = enumerate(zip(hints, value, strict=True))
            return tuple(_convert(item_hint, item, f"{key}[{index}]") for index, (item_hint, item) in items)
    elif origin is float and type(value) is int:
        return float(value)
    elif isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        return value
    raise TypeError(key)
