"""The config section `learner`: what an update is."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, TypeAlias

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Count, Decay, Range, check

StepWeights: TypeAlias = Literal["none", "noise", "flat"]


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    """The config section `learner`.

    Attributes:
      updates: "joint" averages the loss over the active steps and updates once (the paper); "per_active_step" makes
        one update for each active step, in order, the later ones off-policy (the E-GRPO and G2RPO codes).
      minibatches: parts of the samples, of which each makes a "joint" update of its own, one after another, the later
        ones off-policy. A group's samples are dealt to them where their number divides it, in as many passes of the
        model; else its states are.
      epochs: how often these are made of one rollout, the ratio being always to the policy that sampled.
      step_weights: of the active steps' losses, of which late ones weigh more. "none": as they are (the paper);
        "noise": times the step's std, of mean 1 (TempFlow-GRPO); "flat": all weigh alike, whatever the process
        (GRPO-Guard, Precise): the ratio is that of the densities but for its drift, to the power of the std.
      objective: where a sample's gradient ends. "clip": the ratio has left 1 by `clip_range`; "kl_mask": it goes on
        leaving 1 while the step's KL divergence from the policy that sampled is beyond `kl_limit` (Flow-DPPO).
      clip_range: the ratio is clipped to 1 plus or minus this; float32 tells nothing below 1e-7 from 1. The published
        ranges for "flat" are 2e-6 and 4e-6.
      kl_limit: of "kl_mask", averaged over latent dimensions.
      advantage_clip: advantages are clipped to plus or minus this.
      micro_batch: states in one forward and backward pass on one device, gradients being accumulated over the rest;
        None for all, which saves the memory of one copy of the gradients, and takes that of all activations.
      reference_weight: of the distance from the parameters before the first update, which is added to the loss; 0 keeps
        no copy of them.
      reference_in: how that distance is measured: "mean", KL(policy | reference) of each random step, the mean over
        latent dimensions of (m - m_ref)^2 / (2 std^2); "velocity", the mean of (v - v_ref)^2.
      samples: whose samples train: those of the "policy", or of a "trailing" copy of it (DiffusionNFT).
      trailing_decay: of that copy, which is an average as that of `ema_decay`; None keeps none.
      trailing_ramp: in the n-th iteration its decay is at most n times this.
      trailing_weight: of the distance from it in velocity, mean (v - v_trailing)^2, which is added to the loss (AWM).
      ema_decay: of the parameters' exponential moving average, once an iteration, which is then what is evaluated; None
        keeps none.
    """

    updates: Literal["joint", "per_active_step"] = "joint"
    minibatches: Count = 1
    epochs: Count = 1
    step_weights: StepWeights = "none"
    objective: Literal["clip", "kl_mask"] = "clip"
    clip_range: Annotated[float, Range(1e-7, 1000)] = 1e-4
    kl_limit: Annotated[float, Range(1e-12, 1000)] = 1e-5
    advantage_clip: Annotated[float, Range(1e-3, 10**6)] = 5.0
    micro_batch: Count | None = None
    reference_weight: Annotated[float, Range(0, 1000)] = 0.0
    reference_in: Literal["mean", "velocity"] = "mean"
    samples: Literal["policy", "trailing"] = "policy"
    trailing_decay: Decay | None = None
    trailing_ramp: Annotated[float, Range(0, 1)] = 0.001
    trailing_weight: Annotated[float, Range(0, 1000)] = 0.0
    ema_decay: Decay | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.trailing_decay is None and (self.samples == "trailing" or self.trailing_weight):
            raise ConfigError("trailing_decay", None, "a number: samples or trailing_weight ask for a trailing copy")
        if self.updates == "per_active_step" and self.minibatches > 1:
            raise ConfigError("minibatches", self.minibatches, "1, or updates 'joint': active steps are the parts then")
        if self.objective == "clip" and self.kl_limit != LearnerConfig.kl_limit:
            raise ConfigError("kl_limit", self.kl_limit, "objective 'kl_mask', which alone has a limit")

    def updates_of_epoch(self, num_active: int) -> int:
        """Optimizer updates of an epoch with `num_active` active steps."""
        return num_active if self.updates == "per_active_step" else self.minibatches

    def is_scored(self, num_active: int) -> bool:
        """True if the policy that sampled scores all states before the updates: it is not that of all of them."""
        return self.epochs * self.updates_of_epoch(num_active) > 1 or self.samples == "trailing"

    def scorings(self, num_active: int) -> int:
        """Forward passes of each state before the updates: of the policy that sampled, of the copies."""
        return self.is_scored(num_active) + bool(self.reference_weight) + bool(self.trailing_weight)

    @property
    def needs_kl(self) -> bool:
        """True if the loss takes the KL divergence from the policy that sampled, hence its mean."""
        return self.step_weights == "flat" or self.objective == "kl_mask"
