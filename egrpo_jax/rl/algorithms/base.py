"""A section of the config becomes a plan: the base of all algorithms, and their names."""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any

from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.common.plugins import load_attribute
from egrpo_jax.common.ranges import Range, Shift, check
from egrpo_jax.flow.entropy import exp_entropy
from egrpo_jax.flow.grid import Times, shifted_times
from egrpo_jax.flow.process import Cps, DanceSde, ExactSde, FlowSde, NoiseLevel, Process
from egrpo_jax.rl.plan import Branch, Plan

ALGORITHMS: Mapping[str, str] = MappingProxyType(
    {
        "egrpo": "egrpo_jax.rl.algorithms.egrpo:EGrpo",
        "g2rpo": "egrpo_jax.rl.algorithms.g2rpo:G2rpo",
        "ada_grpo": "egrpo_jax.rl.algorithms.ada_grpo:AdaGrpo",
        "tempflow_grpo": "egrpo_jax.rl.algorithms.tempflow_grpo:TempFlowGrpo",
        "flow_grpo": "egrpo_jax.rl.algorithms.flow_grpo:FlowGrpo",
        "flow_grpo_fast": "egrpo_jax.rl.algorithms.flow_grpo_fast:FlowGrpoFast",
        "dance_grpo": "egrpo_jax.rl.algorithms.dance_grpo:DanceGrpo",
        "mix_grpo": "egrpo_jax.rl.algorithms.mix_grpo:MixGrpo",
        "branch_grpo": "egrpo_jax.rl.algorithms.branch_grpo:BranchGrpo",
        "diffusion_nft": "egrpo_jax.rl.algorithms.diffusion_nft:DiffusionNft",
        "awm": "egrpo_jax.rl.algorithms.awm:Awm",
        "v_grpo": "egrpo_jax.rl.algorithms.v_grpo:VGrpo",
    }
)
"""The algorithms, by their names in the config."""
PROCESSES: Mapping[str, Callable[[float], Process]] = MappingProxyType(
    {"flow_sde": FlowSde, "dance_sde": DanceSde, "cps": Cps, "exact_sde": ExactSde}
)
"""The kernels of random steps, by their names in the config; each is made with a noise level."""
GROUP_SIZE = Range(2, 100_000, why="one sample has nothing to be compared with")


@dataclasses.dataclass(frozen=True)
class Algorithm(abc.ABC):
    """The config section `plan`: the algorithm that `algorithm` names, with its own keys beside those of all.

    Attributes:
      algorithm: its name, or "module:attribute" of your own, a dataclass that is derived from `rl.Algorithm`; a section
        without it is "egrpo".
      num_steps: T, steps of the time grid.
      shift: s of the shifted grid t = s u / (1 + (s - 1) u).
      group_size: G, samples that are compared with each other.
    """

    algorithm: str
    num_steps: Annotated[int, Range(2, 10_000)] = 16
    shift: Shift = 3.0
    group_size: Annotated[int, GROUP_SIZE] = 12

    def __post_init__(self) -> None:
        check(self)

    @staticmethod
    def variant(config: Mapping[str, Any]) -> type[Algorithm]:
        """The class that a section of the config is of. Raises UserError if there is no such algorithm."""
        name = config.get("algorithm", "egrpo")
        if not isinstance(name, str) or (name not in ALGORITHMS and ":" not in name):
            raise ConfigError("algorithm", name, f"one of {', '.join(ALGORITHMS)}, or module:attribute of your own")
        found = load_attribute(ALGORITHMS.get(name, name), "config.plan.algorithm")
        if not (isinstance(found, type) and issubclass(found, Algorithm)) or inspect.isabstract(found):
            expected = "a dataclass that is derived from egrpo_jax.rl.Algorithm and has a make_plan"
            raise ConfigError("algorithm", name, expected)
        keys = {field.name for field in dataclasses.fields(found)}
        if len(others := sorted(set(config) - keys)) > 1:  # one alone is a typing error, and has a line of its own
            expected = f"a section `plan` of its own; {', '.join(others)} are keys of another algorithm"
            raise ConfigError("algorithm", name, expected)
        return found

    @abc.abstractmethod
    def make_plan(self, iteration: int = 0, seed: int = 0) -> Plan:
        """The plan of an iteration, counted from 0; all plans of a run have one shape.

        Raises:
          UserError: a process of the user's own cannot be made, or a random step would have no noise.
        """

    @property
    def times(self) -> Times:
        """The grid."""
        return shifted_times(self.num_steps, self.shift)


@dataclasses.dataclass(frozen=True)
class StepAlgorithm(Algorithm):
    """An algorithm of random steps.

    Attributes:
      process: the kernel of random steps: "flow_sde" (Flow-GRPO's and E-GRPO's), "dance_sde", "cps", "exact_sde", or
        "module:attribute" of your own, a class that makes a `flow.Process` of a noise level.
      noise_level: of the process: a of "flow_sde", σ = a √(t / (1 - t)), or η of the others.
    """

    process: str = "flow_sde"
    noise_level: NoiseLevel = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.process in PROCESSES:
            PROCESSES[self.process](self.noise_level)
        elif ":" not in self.process:
            raise ConfigError(
                "process", self.process, f"one of {', '.join(PROCESSES)}, or module:attribute of your own"
            )

    def make_process(self) -> Process:
        """The process that the section names. Raises UserError, whatever one of the user's own does wrong."""
        if self.process in PROCESSES:
            return PROCESSES[self.process](self.noise_level)
        make: Callable[[float], Process] = load_attribute(self.process, "config.plan.process")
        try:
            process = make(self.noise_level)
        except Exception as error:
            raise UserError(
                f"config.plan.process: {self.process!r} makes no process of a noise level: {error}"
            ) from error
        methods = ("noise", "std", "kernel", "jacobian")
        if missing := [name for name in methods if not callable(getattr(process, name, None))]:
            raise UserError(f"config.plan.process: what {self.process!r} makes lacks the methods {', '.join(missing)}")
        return process

    def make_branch(self, process: Process, step: int, span: int = 1, clamped: bool = False) -> Branch:
        """The random step of `process` from grid step `step` on, over `span` of them."""
        times = self.times
        return Branch(
            step=step,
            stop=step + span,
            noise=process.noise(times, step, span),
            exp_entropy=exp_entropy(process, times, step, span),
            unmerged_exp_entropy=exp_entropy(process, times, step, 1),
            clamped=clamped,
        )

    def random_steps(self, process: Process, first: int, count: int) -> tuple[Branch, ...]:
        """`count` single random steps from grid step `first` on. Raises ConfigError if one has no noise."""
        branches = tuple(self.make_branch(process, step) for step in range(first, first + count))
        for branch in branches:
            if not branch.exp_entropy > 0:
                expected = f"one with noise at grid step {branch.step}, which is random"
                raise ConfigError("plan.process", self.process, expected)
        return branches
