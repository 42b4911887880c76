"""The record of how an evaluation was made: all that must be the same for its numbers to come out again."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.plugins import load_attribute
from egrpo_jax.data.prompts import prompts_hash
from egrpo_jax.evaluation import statistics
from egrpo_jax.pipelines import ModelConfig, Pipeline
from egrpo_jax.rewards import ScorersConfig
from egrpo_jax.rewards.registry import BUILT_IN
from egrpo_jax.run.workdir import recorded_config

INTERVALS = f"95 % percentile bootstrap over prompts, {statistics.RESAMPLES} resamples, seed {statistics.SEED}"


def training_rewards(configured: tuple[str, ...], workdir: Path | None) -> tuple[str, ...]:
    """The training rewards of the run in `workdir`, by its own record, or without a run those `configured`.

    Raises:
      UserError: `workdir` is not that of a training run.
    """
    if workdir is None:
        return configured
    try:
        return tuple(recorded_config(workdir)["rewards"]["train"])
    except (KeyError, TypeError):
        raise UserError(f"{workdir / 'config.json'} has no rewards.train; expected a training run's config") from None


def describe_prompts(source: str, prompts: Sequence[str]) -> dict[str, Any]:
    """The source of the prompts, their number and hash."""
    return {"source": source, "count": len(prompts), "sha256": prompts_hash(prompts)}


def describe_model(config: ModelConfig, pipeline: Pipeline) -> dict[str, Any]:
    """The weights of the base model, and what else its images depend on."""
    described = {"name": config.name, "path": config.path, **pipeline.about}
    return {key: value for key, value in described.items() if value is not None}


def describe_reward(name: str, scorers: ScorersConfig) -> str:
    """A description of the reward `name`, with the files or the server it is from."""
    if name in BUILT_IN:
        lines = (load_attribute(BUILT_IN[name], "reward").__doc__ or "").splitlines()
        section = getattr(scorers, "hps" if name.startswith("hps") else name, None)
        files = [] if section is None else [str(value) for value in vars(section).values()]
        return f"{lines[0]} ({', '.join(files)})" if files else lines[0]
    if name in scorers.remote:
        remote = scorers.remote[name]
        model = f", {remote.model}" if remote.api == "chat" else ""
        return f"at {_bare(remote.url)}, API {remote.api}{model}"
    return "the user's own"


def environment() -> dict[str, str]:
    """Versions of what computes the numbers, and the device."""
    packages = {name: importlib.metadata.version(name) for name in ("egrpo_jax", "jax", "flax", "numpy")}
    return packages | {"device": jax.devices()[0].device_kind}


def public_config(record: dict[str, Any]) -> dict[str, Any]:
    """The config `record`, nested mappings, without the query of a server's URL: that may be secret."""
    record = copy.deepcopy(record)
    for remote in record["scorers"]["remote"].values():
        remote["url"] = _bare(remote["url"])
    return record


def _bare(url: str) -> str:
    return url.partition("?")[0]


def document(comparisons: Sequence[statistics.Comparison], protocol: Mapping[str, Any]) -> str:
    """The table in Markdown, how to read it, and all of `protocol` but the config."""
    shown = {key: value for key, value in protocol.items() if key not in ("rewards", "config")}
    return "\n".join(
        [
            statistics.markdown(comparisons),
            "Means over prompts with 95 % intervals. Change: tuned minus base, paired by prompt and noise. Win rate: "
            "share of prompts\nwhere tuned is better, ties counting half. Missing: prompts left out because a score "
            "never came.\n",
            *(f"- {key}: {_show(value)}" for key, value in shown.items()),
            "",
            *(f"- {name}: {what}" for name, what in protocol["rewards"].items()),
            "",
        ]
    )


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
