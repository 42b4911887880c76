"""The configuration of `train`: one frozen dataclass for each section; a config file returns `train_config(...)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, get_args

import ml_collections

from egrpo_jax.common.config import to_config_dict
from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Count, Range, Seed, check
from egrpo_jax.parallel.mesh import MeshConfig
from egrpo_jax.pipelines import ModelConfig
from egrpo_jax.rewards import ScorersConfig
from egrpo_jax.rl.advantage import Combination, Over, trimmed
from egrpo_jax.rl.algorithms.base import Algorithm
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.optimizer import OptimConfig


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """The config section `rewards`; a reward is a built-in name, one of `scorers.remote`, or "module:attribute" of your
    own.

    Attributes:
      train: the training rewards, which the policy is to raise.
      weights: one weight for each of them; below 0 trains against it.
      combination: how they become one advantage. "advantages": each is normalised, then weighted and added; "sum":
        weighted and added, then normalised; "decoupled": normalised, weighted, added, and normalised over all samples.
      mean_of: the samples that a reward is compared with: "group", those of the plan's group, in the paper of its
        prompt and active step; "prompt", all of its prompt, so that a step that does better than others gains; "all".
      std_of: the samples by whose spread that is measured, as wide a choice or a wider one: "all" is Flow-GRPO's global
        std, "prompt" with `mean_of` "group" lets steps that matter more weigh more.
      trim: the share of a group, its lowest rewards, that mean and std are not of (MixGRPO), whole samples, rounded
        down: one failed image does not make the others look alike. They get an advantage too, by the same mean and std.
        Only with both of "group".
      absolute: times z, the distance from the mean of all samples of the iteration by their std, is added to each
        normalised advantage, with "sum" to that of the sum: a sample gains by its prompt doing better than others, also
        where its group is tied (the absolute terms of AdaGRPO and VGPO, within one iteration).
      best_of: n, an even number: only the n/2 highest and n/2 lowest advantages of a group train, G/n times as much,
        so that the loss is the mean over them (DanceGRPO, 8 of 24); None: all. `learner.advantage_clip` comes after.
      clips: for each of them, where its normalised advantage, `absolute` included, is clipped; empty: nowhere.
      diversity: the weight of one more training reward, how far an image is from the others of its group: the mean
        of 1 - cos over these, of the features of `diversity_by`; 0 for none.
      diversity_by: a reward of the run that compares images: one by CLIP, or of your own with `encode_images`.
      heldout: rewards that are only measured beside them: the sight of reward hacking.
      on_missing: what happens if a score never comes, from a server that is down, say. "drop_group": the group that it
        was for is left out of the update, and counted; "fail": the run saves and stops.
    """

    train: tuple[str, ...] = ("emoji",)
    weights: tuple[Annotated[float, Range(-1000, 1000)], ...] = (1.0,)
    combination: Combination = "advantages"
    mean_of: Over = "group"
    std_of: Over = "group"
    trim: Annotated[float, Range(0, 0.9)] = 0.0
    absolute: Annotated[float, Range(0, 1000)] = 0.0
    best_of: Annotated[int, Range(2, 100_000, multiple_of=2)] | None = None
    clips: tuple[Annotated[float, Range(1e-3, 10**6)], ...] = ()
    diversity: Annotated[float, Range(0, 1000)] = 0.0
    diversity_by: str | None = None
    heldout: tuple[str, ...] = ()
    on_missing: Literal["drop_group", "fail"] = "drop_group"

    def __post_init__(self) -> None:
        check(self)
        if not self.train:
            raise ConfigError("train", self.train, "at least one reward")
        if len(self.weights) != len(self.train):
            raise ConfigError("weights", self.weights, f"one weight for each of the {len(self.train)} rewards")
        if not any(self.weights):
            raise ConfigError("weights", self.weights, "a weight other than 0")
        names = self.train + self.heldout
        if len(set(names)) != len(names):
            raise ConfigError("heldout", self.heldout, "every reward once, in train or in heldout")
        if (self.diversity > 0) != (self.diversity_by is not None) or self.diversity_by not in (None, *names):
            expected = f"one of {', '.join(names)} if diversity is above 0, else None"
            raise ConfigError("diversity_by", self.diversity_by, expected)
        self._check_credit()

    def total(self, values: Mapping[str, Any]) -> Any:
        """The weighted sum of the training rewards, of an array of each by its name."""
        return sum(weight * values[name] for name, weight in zip(self.train, self.weights, strict=True))

    def _check_credit(self) -> None:
        if self.clips and len(self.clips) != len(self.train):
            raise ConfigError("clips", self.clips, f"nothing, or a number for each of {self.train}")
        widths = get_args(Over)
        if widths.index(self.std_of) < widths.index(self.mean_of):
            raise ConfigError("std_of", self.std_of, f"{self.mean_of!r}, as mean_of is, or a wider set")
        if self.trim and (self.mean_of, self.std_of) != ("group", "group"):
            raise ConfigError("trim", self.trim, "0, or 'group' as mean_of and std_of: a group is what is trimmed")
        if self.clips and self.combination == "sum":
            raise ConfigError("clips", self.clips, "nothing: 'sum' normalises no reward by itself")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The config section `evaluation`: fixed prompts, fixed noise, the deterministic flow on the plan's grid.

    Attributes:
      prompts: a built-in set, or a file as for training.
      solver: "euler", or "dpm2m", DPM-Solver++(2M), of second order; a step takes one forward pass in either.
      every: iterations between two evaluations; there is always one before the first iteration and after the last.
      batch: prompts sampled at once.
      kept: how many of the prompts, evenly spread, have their images kept; the last report chooses among them.
    """

    prompts: str = "emoji_heldout"
    solver: Literal["euler", "dpm2m"] = "euler"
    every: Count = 10
    batch: Count = 50
    kept: Count = 16

    def __post_init__(self) -> None:
        check(self)
        _check_prompts(self.prompts)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The config section `checkpoint`.

    Attributes:
      every: iterations between two checkpoints; there is always one after the last.
      keep: how many of the newest stay.
    """

    every: Count = 10
    keep: Annotated[int, Range(2, 1_000_000, why="the newest may be damaged")] = 2

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The whole configuration of a training run.

    Attributes:
      name: of the run; it is kept in `runs/<name>` unless --workdir says otherwise.
      seed: of all noise and of the prompts' order.
      num_iterations: rollouts, each with its optimizer updates.
      prompts: a built-in set, or a file: text with one prompt a line, JSONL, JSON, CSV or TSV.
      prompts_per_iteration: over all devices; best a multiple of these: then no anchor is walked twice.
      prompts_per_rollout: how many of them are rolled out at once, a divisor of their number; None: all. Fewer take
        less memory, and rewards on other machines score the images of one rollout during the next.
      tails_per_device: samples that a device carries to images at once, the longest way first; None: as many as are a
        group of each of its prompts. More take more memory, and share each gather of the weights.
      wandb: also log to Weights & Biases (`pip install -e '.[wandb]'`).
      model, rewards, scorers, plan, learner, optim, evaluation, checkpoint, mesh: the sections of these names.
    """

    name: str = "egrpo"
    seed: Seed = 0
    num_iterations: Count = 300
    prompts: str = "emoji_train"
    prompts_per_iteration: Count = 8
    prompts_per_rollout: Count | None = None
    tails_per_device: Count | None = None
    wandb: bool = False
    model: ModelConfig = field(default_factory=ModelConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    scorers: ScorersConfig = field(default_factory=ScorersConfig)
    plan: Algorithm = field(default_factory=EGrpo)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        check(self)
        _check_prompts(self.prompts)
        if any(part in ("", ".", "..") for part in self.name.split("/")):
            raise ConfigError("name", self.name, "the name of a folder within runs/")
        rollout = self.prompts_per_rollout
        if rollout is not None and self.prompts_per_iteration % rollout:
            expected = f"a divisor of prompts_per_iteration, {self.prompts_per_iteration}"
            raise ConfigError("prompts_per_rollout", rollout, expected)
        self._check_group()

    def _check_group(self) -> None:
        """Raises ConfigError for rewards that ask more of a group than it has samples."""
        size, trim, best_of = getattr(self.plan, "group_size", None), self.rewards.trim, self.rewards.best_of
        if size is None:
            return
        if best_of is not None and best_of > size:
            raise ConfigError("rewards.best_of", best_of, f"at most plan.group_size, {size}")
        if trim and size - trimmed(trim, size) < 2:
            raise ConfigError("rewards.trim", trim, f"a share that leaves two or more of plan.group_size, {size}")


def _check_prompts(source: str) -> None:
    """Raises ConfigError for an empty name, which would stand for the folder that the program runs in."""
    if not source:
        raise ConfigError("prompts", source, "a built-in set or a file")


def train_config(config: TrainConfig) -> ml_collections.ConfigDict:
    """The ConfigDict that a config file's `get_config` returns."""
    return to_config_dict(config)
