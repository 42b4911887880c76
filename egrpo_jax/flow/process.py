r"""The random steps of a flow: one class for each published kernel.

A step goes from t to t' < t, over dt = t - t'. The model's velocity v at x_t predicts the data x0 = x - t v and the
noise x1 = x + (1 - t) v, so that x_t = (1 - t) x0 + t x1, and the ODE's step ends at (1 - t') x0 + t' x1 = x - dt v.
Every kernel here takes some of the predicted noise away from that, and adds fresh noise e ~ N(0, 1):

    x' = x - dt v - pull x1 + std e.

Relative to x0 and x1 the noise of x' is then n = sqrt((t' - pull)^2 + std^2), where the model expects t'. What a class
*keeps* is said in terms of n (the *noise level*) and of the distribution of x' over all data (the *marginal*).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Protocol, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Range, check
from egrpo_jax.flow.grid import Times, ends
from egrpo_jax.flow.transition import Kernel, euler_step, over_latents

Scalar: TypeAlias = float | chex.Array
"""A number on the host, in float64, or an array in compiled code."""
NoiseLevel = Annotated[float, Range(1e-4, 100)]


class Process(Protocol):
    """A kernel of random steps; one's own is any class with these four methods.

    A plan asks on the host for the `noise` of each of its steps. Compiled code takes that as an array, as it takes
    times, so that a schedule which moves with the iteration is compiled once. noise 0 gives the ODE's step, which has
    no density: a step that is drawn and scored needs std > 0.
    """

    def noise(self, times: Times, step: int, span: int) -> float:
        """The one number that the step from `times[step]` over `span` grid steps depends on, beside its two times.

        Raises:
          ValueError: the step leaves the grid.
        """

    def std(self, time: Scalar, next_time: Scalar, noise: Scalar) -> Scalar:
        """The standard deviation of the step, on the host as in compiled code."""

    def kernel(
        self, latents: chex.Array, velocity: chex.Array, time: chex.Array, next_time: chex.Array, noise: chex.Array
    ) -> Kernel:
        """The distribution of the next latents, in float32.

        Args:
          latents: x_t, `[B, ...]`, float32.
          velocity: v(x_t, t), like `latents`.
          time, next_time: t > t' >= 0, `[B]` or `[]`.
          noise: of `noise`, `[B]` or `[]`.

        Returns:
          mean `[B, ...]` and std `[B, 1, ...]`.
        """

    def jacobian(self, time: Scalar, next_time: Scalar, noise: Scalar) -> Scalar:
        """J = |d mean / d v|; J / std is how much a step's log-density moves with the velocity."""


class _EulerMaruyama:
    r"""The Euler step of dx = [v + g^2/(2t) x1] dt + g dw, the SDE with the ODE's marginals, its score being -x1/t.

    pull = dt g^2/(2t) and std = g sqrt(dt); `noise` is g at the start of the step.
    """

    def std(self, time: Scalar, next_time: Scalar, noise: Scalar) -> Scalar:
        """g sqrt(dt)."""
        return noise * _sqrt(time - next_time)

    def kernel(
        self, latents: chex.Array, velocity: chex.Array, time: chex.Array, next_time: chex.Array, noise: chex.Array
    ) -> Kernel:
        """N(x - dt [v + g^2/(2t) x1], g^2 dt); see `Process`."""
        time, next_time, noise = _scalars(latents, velocity, time, next_time, noise)
        drift = velocity + jnp.square(noise) / (2 * time) * (latents + (1 - time) * velocity)
        return Kernel(latents - (time - next_time) * drift, self.std(time, next_time, noise))

    def jacobian(self, time: Scalar, next_time: Scalar, noise: Scalar) -> Scalar:
        """dt [1 + g^2 (1-t)/(2t)]."""
        return (time - next_time) * (1 + noise**2 * (1 - time) / (2 * time))


class _SameNoise:
    r"""The step to (1 - t') x0 + sqrt(t'^2 - std^2) x1 + std e, whose noise level is t' for every std in [0, t'].

    pull = t' - sqrt(t'^2 - std^2); `noise` is the std. It is 0 at t' = 0, which hence no random step reaches.
    """

    def std(self, time: Scalar, next_time: Scalar, noise: Scalar) -> Scalar:
        """The noise itself."""
        del time, next_time
        return noise

    def kernel(
        self, latents: chex.Array, velocity: chex.Array, time: chex.Array, next_time: chex.Array, noise: chex.Array
    ) -> Kernel:
        """N((1 - t') x0 + sqrt(t'^2 - std^2) x1, std^2); see `Process`."""
        time, next_time, std = _scalars(latents, velocity, time, next_time, noise)
        mean = euler_step(latents, velocity, time, next_time)
        return Kernel(mean - _pull(next_time, std) * (latents + (1 - time) * velocity), std)

    def jacobian(self, time: Scalar, next_time: Scalar, noise: Scalar) -> Scalar:
        """t (1 - t') - (1 - t) sqrt(t'^2 - std^2) = dt + (1 - t) pull."""
        return time - next_time + (1 - time) * _pull(next_time, noise)


@dataclasses.dataclass(frozen=True)
class Ode(_EulerMaruyama):
    """The deterministic Euler step x - dt v.

    It keeps the noise level, and in the limit of small steps the marginals.
    """

    def noise(self, times: Times, step: int, span: int) -> float:
        """0."""
        ends(times, step, span)
        return 0.0


@dataclasses.dataclass(frozen=True)
class FlowSde(_EulerMaruyama):
    r"""The SDE of Flow-GRPO (arXiv:2505.05470, eq. 12), which E-GRPO (arXiv:2601.00423) uses.

    g = a sqrt(t/(1-t)). At t = 1 that is infinite; as in the codes of both the next time of the grid then stands in
    for t in 1 - t, however far the step goes.

    It keeps noise level and marginals in the limit of small steps only. A step adds too much noise,
    n^2 - t'^2 = (g dt)^2 (1 + (g/2)^2/t) / t: on E-GRPO's grid up to 5 % of n in single steps, 10 % in merged ones.

    Attributes:
      noise_level: a; 0.7 in both papers, 0.9 for FLUX in Flow-GRPO's code.
    """

    noise_level: NoiseLevel = 0.7

    def __post_init__(self) -> None:
        check(self)

    def noise(self, times: Times, step: int, span: int) -> float:
        """g = a sqrt(t/(1-t))."""
        time, _ = ends(times, step, span)
        remaining = 1 - (times[step + 1] if time == 1 else time)
        return self.noise_level * math.sqrt(time / remaining)


@dataclasses.dataclass(frozen=True)
class DanceSde(_EulerMaruyama):
    """The SDE of DanceGRPO (arXiv:2505.07818), that of Flow-GRPO with one coefficient g = eta for all times.

    It keeps noise level and marginals in the limit of small steps only, and adds too much noise in larger ones.

    Attributes:
      noise_level: eta; 0.3 in the published code.
    """

    noise_level: NoiseLevel = 0.3

    def __post_init__(self) -> None:
        check(self)

    def noise(self, times: Times, step: int, span: int) -> float:
        """g = eta."""
        ends(times, step, span)
        return self.noise_level


@dataclasses.dataclass(frozen=True)
class Cps(_SameNoise):
    """Coefficients-preserving sampling (Flow-CPS, arXiv:2509.05952): std = t' sin(eta pi/2), whatever dt is.

    It keeps the noise level, exactly, for any step. It does not keep the marginals, not even in the limit of small
    steps: each of them replaces the same share of the noise, and a chain of many loses a part of the data's variance.

    The published code leaves variance and constants out of the log-density; here it is that of the Gaussian.

    Attributes:
      noise_level: eta, from 0 (the ODE) to 1 (all noise is fresh); 0.7, and 0.8 in Flow-GRPO-Fast.
    """

    noise_level: Annotated[float, Range(1e-4, 1)] = 0.7

    def __post_init__(self) -> None:
        check(self)

    def noise(self, times: Times, step: int, span: int) -> float:
        """std = t' sin(eta pi/2)."""
        _, next_time = ends(times, step, span)
        return next_time * math.sin(self.noise_level * math.pi / 2)


@dataclasses.dataclass(frozen=True)
class ExactSde(_SameNoise):
    r"""Flow-GRPO's SDE solved over the whole step with x0 held fixed (Precise, arXiv:2605.23522).

    With x0 fixed, z = (x - (1-t) x0)/t = x1 has the SDE of an Ornstein-Uhlenbeck process towards N(0, 1), at the rate
    g^2/t^2 = eta^2/(t(1-t)). Integrated from t to t' that is -eta^2 ln r, with r = t'(1-t)/(t(1-t')), so that

        z' = r^{eta^2/2} z + sqrt(1 - r^{eta^2}) e,      std = t' sqrt(1 - r^{eta^2}).

    At t = 1 all noise is fresh: r = 0. As dt goes to 0 it becomes `FlowSde`; eta = sqrt(2) is DDIM's ancestral step.

    It keeps the noise level, exactly, for any step. It does not keep every marginal: as in a step of the ODE, data of
    variance s^2 lose of the order of s^2 dt^2 in a step, and nothing in the limit of small ones.

    Attributes:
      noise_level: eta, in the place of `FlowSde`'s a; 1.5 in the published code.
    """

    noise_level: NoiseLevel = 1.5

    def __post_init__(self) -> None:
        check(self)

    def noise(self, times: Times, step: int, span: int) -> float:
        """std = t' sqrt(1 - r^{eta^2})."""
        time, next_time = ends(times, step, span)
        ratio = next_time * (1 - time) / (time * (1 - next_time))
        return next_time * math.sqrt(1 - ratio**self.noise_level**2)


Stds = tuple[Annotated[float, Range(1e-4, 1000)], ...]


@dataclasses.dataclass(frozen=True)
class ByStd:
    """A standard deviation of one's own choice.

    Attributes:
      stds: one for all steps, or one for each step of the grid.
    """

    stds: Stds

    def __post_init__(self) -> None:
        check(self)
        if not self.stds:
            raise ConfigError("stds", self.stds, "one standard deviation, or one for each step of the grid")

    def chosen(self, times: Times, step: int) -> float:
        """That of a step. Raises ConfigError if `stds` are those of a grid of another length."""
        steps = len(times) - 1
        if len(self.stds) not in (1, steps):
            raise ConfigError("stds", self.stds, f"one standard deviation, or one for each of the grid's {steps} steps")
        return self.stds[step if len(self.stds) > 1 else 0]


@dataclasses.dataclass(frozen=True)
class ExactByStd(ByStd, _SameNoise):
    """The step of `ExactSde` with a standard deviation of one's own choice, at most t': then all noise is fresh.

    It keeps the noise level, exactly, for any step, but not the marginals: see `ExactSde`, and where the std does not
    shrink with dt, `Cps`. It is a step of `ExactSde` with eta^2 = ln(1 - (std/t')^2) / ln r.
    """

    def noise(self, times: Times, step: int, span: int) -> float:
        """std, at most t'. Raises ConfigError if `stds` are those of a grid of another length."""
        _, next_time = ends(times, step, span)
        return min(self.chosen(times, step), next_time)


@dataclasses.dataclass(frozen=True)
class FlowByStd(ByStd, _EulerMaruyama):
    """The step of `FlowSde` with a standard deviation of one's own choice.

    As a step of `FlowSde` of this std it adds too much noise: n^2 - t'^2 = std^2 [dt + std^2/(4 t)] / t.
    """

    def noise(self, times: Times, step: int, span: int) -> float:
        """g = std / sqrt(dt). Raises ConfigError if `stds` are those of a grid of another length."""
        time, next_time = ends(times, step, span)
        return self.chosen(times, step) / math.sqrt(time - next_time)


def _scalars(latents: chex.Array, velocity: chex.Array, *scalars: chex.Array) -> list[chex.Array]:
    """`scalars` with the axes of `latents`; latents and velocity have to be alike, and float32."""
    chex.assert_equal_shape([latents, velocity])
    chex.assert_type([latents, velocity], jnp.float32)
    return [over_latents(scalar, latents) for scalar in scalars]


def _sqrt(x: Scalar) -> Scalar:
    return jnp.sqrt(x) if isinstance(x, jax.Array) else np.sqrt(x)  # NumPy keeps float64 and takes no traced array


def _pull(next_time: Scalar, std: Scalar) -> Scalar:
    """t' - sqrt(t'^2 - std^2)."""
    # A product, not a difference of squares: that of t' and a std near it is exact in float32.
    return next_time - _sqrt((next_time - std) * (next_time + std))
