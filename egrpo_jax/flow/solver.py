r"""Solving the flow's ODE from a time of the grid to its end.

Over a step from t to t', dt = t - t', the velocity v predicts the data x0 = x - t v, and the ODE has the solution

    x' = (t'/t) x + (dt/t) X,

X being a mean of what x0 is over the step. X = x0 gives the Euler step x - dt v. A second order costs no more
velocities: it extrapolates X from x0 and x0 of the step before, by a weight that only times enter. All weights come as
a table from the host, so that a compiled walk takes them as it takes times.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Protocol

import chex
import jax
import jax.numpy as jnp

from egrpo_jax.common.ranges import Range, check
from egrpo_jax.flow.grid import Times, respaced_times, steps_left
from egrpo_jax.flow.transition import euler_step, over_latents

VelocityFn = Callable[[Any, chex.Array, chex.Array, Any], chex.Array]
"""`(params, latents[B, N, D], time[B], conditioning) -> velocity[B, N, D]`, the one thing known about a model."""


class Solver(Protocol):
    """A solver of the ODE that takes one velocity for each step; one's own is any class with these four methods."""

    def nodes(self, times: Times, start: int) -> Times:
        """The times of a walk from `times[start]` to the end of the grid; each but the last takes a velocity."""

    def weights(self, nodes: Times) -> tuple[float, ...]:
        """For each step of a walk, the number that it depends on beside its two times."""

    def history(self, latents: chex.Array) -> Any:
        """That which a step leaves to the next one, before the first step of `latents [B, N, D]`; an array, or ()."""

    def step(
        self,
        latents: chex.Array,
        velocity: chex.Array,
        time: chex.Array,
        next_time: chex.Array,
        weight: chex.Array,
        history: Any,
    ) -> tuple[chex.Array, Any]:
        """One step of B walks, each of which may be at a time of its own.

        Args:
          latents, velocity: `[B, N, D]` at `time`.
          time, next_time, weight: `[B]` or `[]`.
          history: of the step before, whatever it holds where a walk begins: there `weight` is 0.

        Returns:
          latents `[B, N, D]` at `next_time`, and the history for the next step.
        """


@dataclasses.dataclass(frozen=True)
class Euler:
    """Euler steps from grid time to grid time.

    Attributes:
      stride: grid steps in each; a last step that it does not divide is shorter.
    """

    stride: Annotated[int, Range(1, 10_000)] = 1

    def __post_init__(self) -> None:
        check(self)

    def nodes(self, times: Times, start: int) -> Times:
        """Every so-manieth time of the grid, and its last."""
        return (*(times[start + done] for done in range(0, steps_left(times, start), self.stride)), times[-1])

    def weights(self, nodes: Times) -> tuple[float, ...]:
        """None: each is 0."""
        return (0.0,) * (len(nodes) - 1)

    def history(self, latents: chex.Array) -> tuple[()]:
        """None."""
        del latents
        return ()

    def step(
        self,
        latents: chex.Array,
        velocity: chex.Array,
        time: chex.Array,
        next_time: chex.Array,
        weight: chex.Array,
        history: tuple[()],
    ) -> tuple[chex.Array, tuple[()]]:
        """x - dt v."""
        del weight
        return euler_step(latents, velocity, time, next_time), history


@dataclasses.dataclass(frozen=True)
class DpmSolver2M:
    r"""DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2), with which MixGRPO-Flash (arXiv:2507.21802) walks its tails.

    x0 is extrapolated to the middle of a step in lambda = ln((1-t)/t), where the step has the length
    h = lambda(t') - lambda(t), and the one before h_p:

        x' = (t'/t) x + (dt/t) [x0 + h/(2 h_p) (x0 - x0_p)] = x - dt v + w (x0 - x0_p),      w = (dt/t) h/(2 h_p).

    The first step has no past, and on the last one h is infinite: both are Euler steps, and so is the one after a step
    from t = 1. Two steps are hence what Euler's are.

    Attributes:
      steps: velocities of a walk, but never more than there are grid steps left; their times are spaced as the grid is.
    """

    steps: Annotated[int, Range(1, 10_000)]

    def __post_init__(self) -> None:
        check(self)

    def nodes(self, times: Times, start: int) -> Times:
        """Times evenly spaced in u = k/T, then shifted as the grid is."""
        return respaced_times(times, start, min(self.steps, steps_left(times, start)))

    def weights(self, nodes: Times) -> tuple[float, ...]:
        """w of each step."""
        lambdas = [math.log((1 - t) / t) if t < 1 else -math.inf for t in nodes[:-1]]
        lengths = [after - before for before, after in itertools.pairwise(lambdas)]
        shares = [1 - after / before for before, after in itertools.pairwise(nodes)]
        inner = (share * h / (2 * past) for share, h, past in zip(shares[1:], lengths[1:], lengths, strict=False))
        return (0.0, *inner, 0.0)[: len(nodes) - 1]

    def history(self, latents: chex.Array) -> chex.Array:
        """x0, of which there is none yet."""
        return jnp.zeros_like(latents)

    def step(
        self,
        latents: chex.Array,
        velocity: chex.Array,
        time: chex.Array,
        next_time: chex.Array,
        weight: chex.Array,
        history: chex.Array,
    ) -> tuple[chex.Array, chex.Array]:
        """x - dt v + w (x0 - x0_p)."""
        data = latents - over_latents(time, latents) * velocity
        weight = over_latents(weight, latents)
        # Not a product with 0: the history may be another walk's, and not finite.
        extrapolation = jnp.where(weight == 0, 0, weight * (data - history))
        return euler_step(latents, velocity, time, next_time) + extrapolation, data


SOLVERS: Mapping[str, Callable[[int], Solver]] = MappingProxyType({"euler": lambda _: Euler(), "dpm2m": DpmSolver2M})
"""Solvers by name; each is made of the steps of a grid, all of which it takes."""


def tail_steps(solver: Solver, times: Times, start: int) -> int:
    """The velocities, and steps, of a walk from `times[start]` to the end of the grid."""
    return len(solver.nodes(times, start)) - 1


def solve_path(
    velocity_fn: VelocityFn, params: Any, latents: chex.Array, times: chex.Array, conditioning: Any
) -> tuple[chex.Array, chex.Array, chex.Array]:
    """Euler steps over all of `times`, keeping the path.

    Args:
      velocity_fn, params, conditioning: the model; `conditioning` has leading axis B.
      latents: `[B, N, D]` at `times[0]`.
      times: `[T + 1]`, decreasing.

    Returns:
      The final latents `[B, N, D]`, and, at the start of each step, latents and velocities `[T, B, N, D]`.
    """

    def step(x: chex.Array, span: tuple[chex.Array, chex.Array]) -> tuple[chex.Array, tuple[chex.Array, chex.Array]]:
        time, next_time = span
        velocity = velocity_fn(params, x, jnp.broadcast_to(time, x.shape[:1]), conditioning)
        return euler_step(x, velocity, time, next_time), (x, velocity)

    final, (path, velocities) = jax.lax.scan(step, latents, (times[:-1], times[1:]))
    return final, path, velocities


def solve(
    solver: Solver, velocity_fn: VelocityFn, params: Any, latents: chex.Array, times: Times, conditioning: Any
) -> chex.Array:
    """A walk of `solver` over a whole grid, of which nothing is kept.

    Args:
      solver: takes `tail_steps(solver, times, 0)` velocities.
      velocity_fn, params, conditioning: the model; `conditioning` has leading axis B.
      latents: `[B, N, D]` at `times[0]`.
      times: the grid.

    Returns:
      Latents `[B, N, D]` at `times[-1]`.
    """
    nodes = solver.nodes(times, 0)
    table = jnp.array(nodes, jnp.float32)
    weights = jnp.array(solver.weights(nodes), jnp.float32)

    def step(carry: tuple[chex.Array, Any], row: tuple[chex.Array, ...]) -> tuple[tuple[chex.Array, Any], None]:
        x, history = carry
        time, next_time, weight = row
        velocity = velocity_fn(params, x, jnp.broadcast_to(time, x.shape[:1]), conditioning)
        return solver.step(x, velocity, time, next_time, weight, history), None

    return jax.lax.scan(step, (latents, solver.history(latents)), (table[:-1], table[1:], weights))[0][0]
