"""An iteration of E-GRPO in PyTorch over diffusers' FLUX transformer, as public codes for GRPO on flows write it.

Anchor, branches, tails, then an update with gradient accumulation and one step of AdamW with clipping: the plan of
ours, on the same grid. What the public codes differ in, and what is measured here:

- *The rollout's batch.* E-GRPO's own code (VisualGRPO), G2RPO's and DanceGRPO's take one image at a time; Flow-GRPO's
  takes many at once: here a group. Each sample has the velocity of its branch computed, though all that share a state
  have the same, and its tail walked by itself or with its group.
- *The update.* Flow-GRPO, DanceGRPO and MixGRPO give each sample a forward and a backward pass of its own, in batches
  that fit the memory: here of one, or of a group. E-GRPO's code and G2RPO's make one forward and backward pass of a
  state serve all of its samples (`shared`), as ours does.

Where E-GRPO's code departs from its paper, this follows the paper as ours does, so that either does the same work:
tails go on from where a merged step ends, and the optimizer steps once, not once for each active step. The time is
exact, not cut to thousandths.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from benchmarks.random_flux import GUIDANCE, Shape, copy_weights, diffusers_model, token_ids
from egrpo_jax.rl.plan import Branch, Plan
from egrpo_jax.training.config import TrainConfig
from egrpo_jax.weights.layout import Params


class Samples(NamedTuple):
    """The samples of a rollout: states `[P, E, N, D]`, `[P, E, G, N, D]` after the random step and at t = 0, and the
    log-densities `[P, E, G]`."""

    latents: torch.Tensor
    next_latents: torch.Tensor
    ends: torch.Tensor
    log_prob: torch.Tensor


class TorchLoop:
    """The loop, on the CPU in float32.

    Attributes:
      calls: samples that the model was called on, so far.
    """

    def __init__(self, shape: Shape, params: Params, plan: Plan, config: TrainConfig):
        self._shape, self._plan, self._learner = shape, plan, config.learner
        self._model = diffusers_model(shape.config, "cpu", torch.float32)
        copy_weights(shape.config, params, self._model)
        self._ids = token_ids(shape.text_tokens, shape.grid, "cpu")
        given = shape.conditioning(config.prompts_per_iteration)
        self._text, self._pooled = (torch.from_numpy(given[name]) for name in ("text", "pooled"))
        optim = config.optim
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(), optim.learning_rate, (optim.b1, optim.b2), optim.eps, optim.weight_decay
        )
        self._grad_clip = optim.grad_clip
        self.calls = 0

    def velocity(self, latents: torch.Tensor, time: float, prompt: int) -> torch.Tensor:
        """The velocity of `latents [B, N, D]` of one prompt."""
        count = len(latents)
        self.calls += count
        row = lambda x: x[prompt : prompt + 1].expand(count, *x.shape[1:])
        return self._model(
            latents, row(self._text), row(self._pooled), torch.full((count,), time),
            guidance=torch.full((count,), GUIDANCE), **self._ids, return_dict=False,
        )[0]  # fmt: skip

    @torch.no_grad()
    def roll_out(self, noise: torch.Tensor, batch: int) -> Samples:
        """The samples from the anchors' `noise [P, N, D]`, `batch` of them at once."""
        groups = []
        for prompt, start in enumerate(noise):
            anchor = self.walk(start[None], 0, prompt)
            groups += [self._group(anchor[branch.step], branch, prompt, batch) for branch in self._plan.branches]
        shape = (len(noise), len(self._plan.branches))
        return Samples(*(torch.stack(part).unflatten(0, shape) for part in zip(*groups, strict=True)))

    @torch.no_grad()
    def ends(self, samples: torch.Tensor) -> torch.Tensor:
        """Where the tails of samples `[P, E, G, N, D]` end."""
        ends = torch.empty_like(samples)
        for prompt, (active, branch) in itertools.product(range(len(samples)), enumerate(self._plan.branches)):
            ends[prompt, active] = self.walk(samples[prompt, active], branch.stop, prompt)[-1]
        return ends

    def walk(self, latents: torch.Tensor, start: int, prompt: int) -> list[torch.Tensor]:
        """Euler steps of `latents [B, N, D]` from grid step `start` to the end: the latents before each and after."""
        path = [latents]
        for time, next_time in itertools.pairwise(self._plan.times[start:]):
            path.append(path[-1] - (time - next_time) * self.velocity(path[-1], time, prompt))
        return path

    def _group(self, state: torch.Tensor, branch: Branch, prompt: int, batch: int) -> tuple[torch.Tensor, ...]:
        """The samples of one state `[1, N, D]`: as `Samples`, without P and E."""
        parts = []
        for _ in range(self._plan.group_size // batch):
            rows = state.expand(batch, -1, -1)
            mean, std = self._kernel(rows, self.velocity(rows, self._plan.times[branch.step], prompt), branch)
            after = mean + std * torch.randn_like(mean)
            parts.append((after, self.walk(after, branch.stop, prompt)[-1], log_density(after, mean, std)))
        return state[0], *(torch.cat(part) for part in zip(*parts, strict=True))

    def _kernel(self, x: torch.Tensor, v: torch.Tensor, branch: Branch) -> tuple[torch.Tensor, float]:
        """Mean and standard deviation of the random step (Flow-GRPO, arXiv:2505.05470)."""
        t, span = self._plan.times[branch.step], self._plan.times[branch.step] - self._plan.times[branch.stop]
        pull = branch.noise**2 / (2 * t)
        return x * (1 - pull * span) - v * (1 + pull * (1 - t)) * span, branch.noise * span**0.5

    def update(self, samples: Samples, batch: int, shared: bool) -> None:
        """One step of the optimizer by the benchmark's reward."""
        self.gradient(samples, group_advantage(samples), batch, shared)
        self._optimizer.step()

    def gradient(self, samples: Samples, advantage: torch.Tensor, batch: int, shared: bool) -> float:
        """Sets the clipped gradient of the loss by advantages `[P, E, G]`, of passes for `batch` samples each, and
        returns the norm that it had: each sample has its own rows in a pass, or, if `shared`, all have one."""
        self._optimizer.zero_grad()
        for prompt, (active, branch) in itertools.product(range(len(advantage)), enumerate(self._plan.branches)):
            for first in range(0, self._plan.group_size, batch):
                rows = (prompt, active, slice(first, first + batch))
                state = samples.latents[prompt, active][None]
                given = state if shared else state.expand(batch, -1, -1)
                velocity = self.velocity(given, self._plan.times[branch.step], prompt)
                log_prob = log_density(samples.next_latents[rows], *self._kernel(given, velocity, branch))
                ratio = torch.exp(log_prob - samples.log_prob[rows])
                (self._loss(ratio, advantage[rows]).sum() / advantage.numel()).backward()
        return float(torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._grad_clip))

    def _loss(self, ratio: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        advantage = advantage.clamp(-self._learner.advantage_clip, self._learner.advantage_clip)
        clipped = ratio.clamp(1 - self._learner.clip_range, 1 + self._learner.clip_range)
        return torch.maximum(-advantage * ratio, -advantage * clipped)


def log_density(sample: torch.Tensor, mean: torch.Tensor, std: float) -> torch.Tensor:
    """The Gaussian log-density of `sample [B, N, D]`, averaged over N and D: `[B]`."""
    return torch.distributions.Normal(mean, std).log_prob(sample.detach()).mean((-2, -1))


def group_advantage(samples: Samples) -> torch.Tensor:
    """Advantages `[P, E, G]` of the benchmark's reward, normalised within each group."""
    reward = torch.sigmoid(samples.ends[..., :3]).mean((-2, -1))
    return (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-8)
