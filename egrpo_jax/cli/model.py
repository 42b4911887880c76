"""Flags of programs that take a model's weights: those of a config, or those that a run has trained."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from absl import flags

from egrpo_jax.cli.program import define_config
from egrpo_jax.common.config import from_config_dict, to_config_dict
from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.run.workdir import differences, recorded_config
from egrpo_jax.training.config import TrainConfig

_WEIGHTS = re.compile(r"model\..*|learner\.ema_decay")
"""Keys that decide what the weights of a run mean."""
_PLACES = re.compile(r"model\.(path|published\.transformer)")
"""Those of them where a difference may be a folder that was moved."""
_FREE = re.compile(
    r"model\.published\.(height|width|guidance|negative|text_tokens|embeddings|offload_encoders|lora_weights|int8_base|dtype|param_dtype|decode_\w+|remat|attention)"
)
"""Those of them that say how the weights are used, or from where they started."""


class ModelFlags:
    """The flags --config and --workdir, of which one is enough."""

    def __init__(self, values: flags.FlagValues):
        self._config = define_config(values, required=False)
        self._workdir = flags.DEFINE_string(
            "workdir", None, "A training run whose weights are taken; its config is the default.", flag_values=values
        )

    @property
    def workdir(self) -> Path | None:
        """The training run's folder."""
        return None if self._workdir.value is None else Path(self._workdir.value)

    def config(self) -> TrainConfig:
        """The config that is given, or without one the run's own.

        Raises:
          UserError: neither flag is given, the run's record cannot be read, or the two contradict one another in what
            defines the weights.
        """
        given, workdir = self._config.value, self.workdir
        if workdir is None:
            if given is None:
                raise UserError("expected --config with a config file, or --workdir with a training run")
            return from_config_dict(TrainConfig, given)
        recorded = run_config(workdir)
        if given is None:
            return recorded
        config = from_config_dict(TrainConfig, given)
        compare_weights(workdir, recorded, config)
        return config


def run_config(workdir: Path) -> TrainConfig:
    """The config of the run in `workdir`, by its own record. Raises UserError if that is none of this version."""
    record = recorded_config(workdir)
    try:
        return from_config_dict(TrainConfig, record)
    except ConfigError as error:
        raise UserError(f"{workdir / 'config.json'}: {error}") from None


def compare_weights(workdir: Path, recorded: TrainConfig, given: TrainConfig) -> None:
    """Compares what defines the weights of the run in `workdir`; a base model elsewhere is worth a warning.

    Raises:
      UserError: `given` is of other weights than `recorded`.
    """
    changes = {
        key: values
        for key, values in differences(_as_dict(recorded), _as_dict(given)).items()
        if _WEIGHTS.fullmatch(key) and not _FREE.fullmatch(key)
    }
    moved = [key for key in changes if _PLACES.fullmatch(key)]
    refused = sorted(changes.keys() - {*moved}, key=lambda key: (key != "model.name", key))
    if refused:
        key, (was, now) = refused[0], changes[refused[0]]
        raise UserError(
            f"config.{key} is {now}, but the run in {workdir} was trained with {was}, which defines its weights; "
            "leave --config out, or set the key to that"
        )
    for key in moved:
        was, now = changes[key]
        print(f"warning: config.{key} is {now}; the run was trained from {was}", file=sys.stderr)


def _as_dict(config: TrainConfig) -> dict[str, Any]:
    return to_config_dict(config).to_dict()
