"""Writes docs/config.md from the config dataclasses and their docstrings: `python -m docs.make_config`."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from egrpo_jax.common.ranges import Range
from egrpo_jax.pretraining.flow import FlowJob
from egrpo_jax.pretraining.loop import Optim
from egrpo_jax.pretraining.text import TextJob
from egrpo_jax.pretraining.towers import TowerJob
from egrpo_jax.rl.algorithms.base import ALGORITHMS, Algorithm
from egrpo_jax.training.config import TrainConfig

FILE = Path(__file__).with_name("config.md")
JOBS = {"text": TextJob, "tower": TowerJob, "flow": FlowJob, "optim, of all three": Optim}
INTRODUCTION = """# Config

<!-- Made by `python -m docs.make_config` from the dataclasses; edit their docstrings, not this file. -->

A config file's `get_config(variant)` returns `train_config(TrainConfig(...))`, see `configs/`. Every key can be
overridden on the command line:

| what | how |
|---|---|
| a number, a text | `--config.plan.group_size=16`, `--config.prompts=mine.txt` |
| a bool | `--config.wandb`, `--config.wandb=false` |
| several numbers | `--config.plan.active_steps=0,2,4` |
| several texts | `--config.rewards.heldout=emoji_judge --config.rewards.heldout=emoji_judge_r1` |
| `None`, where the type has it | `--config.plan.entropy_threshold=None --config.plan.merges=1,1,1,1` |
| a section that may be missing | `--config.model.published.lora="{'rank': 8}"`, `--config.model.published.lora=None` |
| another algorithm | `--config.plan="{'algorithm': 'mix_grpo', 'num_steps': 8}"`; what it does not say is the default |
| sections by name | `--config.scorers.remote="{'judge': {'url': 'http://host:8000'}}"` |

The whole config is checked before anything is loaded, and a mistake is one line: the key, what was found, what would be
right. Both ends of a range belong to it. Ranges are wide: they keep out what makes no sense, not what is unusual.
The defaults are the paper's where it states them.
"""


def document() -> str:
    """The file's text."""
    parts = [INTRODUCTION]
    for prefix, cls in sections(TrainConfig):
        title = prefix.removesuffix(".") or "The run"
        parts.append(of_algorithm(cls) if is_algorithm(cls) else section(f"## {title}", cls, prefix))
    parts.append("# Config of `pretrain`\n\nIts key `kind` says which of these it is.\n")
    parts += [section(f"## {name}", cls, "optim." if cls is Optim else "") for name, cls in JOBS.items()]
    return "\n".join(parts)


def sections(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, type[Any]]]:
    """`cls` and the sections below it, with what their keys begin with; after `plan` those of all algorithms."""
    yield prefix, cls
    if cls is Algorithm:
        yield from ((prefix, Algorithm.variant({"algorithm": name})) for name in ALGORITHMS)
    for name, hint in typing.get_type_hints(cls).items():
        for option in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(option):
                named = "NAME." if typing.get_origin(hint) is dict else ""
                yield from sections(typing.cast(type[Any], option), f"{prefix}{name}.{named}")


def is_algorithm(cls: type[Any]) -> bool:
    """Tells if `cls` is one of the algorithms."""
    return issubclass(cls, Algorithm) and cls is not Algorithm


def of_algorithm(cls: type[Algorithm]) -> str:
    """The part of an algorithm: the keys that it adds to those of all, or has another default or range for."""
    own, shared = (typing.get_type_hints(of, include_extras=True) for of in (cls, Algorithm))
    defaults = {field.name: field.default for field in dataclasses.fields(Algorithm)}
    fields = {field.name: field for field in dataclasses.fields(cls)}
    name = fields.pop("algorithm").default
    as_all = [key for key in defaults if key in fields and fields[key].default == defaults[key]]
    same = [key for key in as_all if own[key] == shared[key]]
    return section(f"### plan of `{name}`", cls, "plan.", [key for key in fields if key not in same])


def section(heading: str, cls: type[Any], prefix: str, keys: Sequence[str] | None = None) -> str:
    """A heading and a table of the keys of `cls`, all or some, without those that have tables of their own."""
    meanings, hints = attributes(cls), typing.get_type_hints(cls, include_extras=True)
    above = attributes(Algorithm) if is_algorithm(cls) else {}
    # A section of several kinds has the defaults of the one that it is if it does not say which.
    fields = {field.name: field for field in dataclasses.fields(cls.variant({}) if inspect.isabstract(cls) else cls)}
    lines = [heading, "", summary(cls), "", "| key | type | default | range | meaning |", "|---|---|---|---|---|"]
    for name in (field.name for field in dataclasses.fields(cls)):
        hint = hints[name]
        if not dataclasses.is_dataclass(hint) and (keys is None or name in keys):
            meaning = "as above" if above.get(name) == meanings[name] else meanings[name]
            cells = (f"`{prefix}{name}`", kind(hint), default(fields[name]), allowed(hint), meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def summary(cls: type[Any]) -> str:
    """The docstring without its attributes, in one line."""
    return " ".join((inspect.getdoc(cls) or "").split("Attributes:\n")[0].split())


def attributes(cls: type[Any]) -> dict[str, str]:
    """The descriptions in the docstring's part `Attributes:`, or that of the class it is derived from, by the names of
    the fields; several may share one."""
    _, _, part = (inspect.getdoc(cls) or "").partition("Attributes:\n")
    entries = re.findall(r"^  (\w+(?:, \w+)*): (.*(?:\n    .*)*)", part, flags=re.M)
    own = {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}
    return own if cls.__base__ is object else attributes(cls.__base__) | own


def kind(hint: Any) -> str:
    """The type in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind(arg) for arg in args)
    if origin is Annotated:
        return kind(args[0])
    if origin is tuple:
        return f"several {kind(args[0])}"
    if origin is dict:
        return "sections by name"
    if origin is typing.Literal:
        return ", ".join(written(arg) for arg in args)
    return "section" if dataclasses.is_dataclass(hint) else "`None`" if hint is type(None) else hint.__name__


def default(field: dataclasses.Field[Any]) -> str:
    """The default as one would write it."""
    if field.default_factory is not dataclasses.MISSING:
        return written(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else written(field.default)


def written(value: Any) -> str:
    """A value as code."""
    if isinstance(value, float) and 0 < value < 1e-3:
        return f"`{np.format_float_scientific(value, trim='-', exp_digits=1)}`"
    return f"`{value!r}`".replace("'", '"')


def allowed(hint: Any) -> str:
    """The range of a field's numbers, at whatever depth; nothing if it has none."""
    if isinstance(hint, Range):
        multiples = f", multiples of {hint.multiple_of}" if hint.multiple_of > 1 else ""
        return f"{hint.low} to {hint.high}{multiples}" + ("" if hint.also is None else f", or {hint.also}")
    return next((found for part in typing.get_args(hint) if (found := allowed(part))), "")


if __name__ == "__main__":
    FILE.write_text(document())
