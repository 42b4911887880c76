"""From what was measured to a schedule: which steps to make random, how, and what tails are good enough."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from egrpo_jax.analysis.study import FormStudy, StepStudy

ABOVE_FLOOR = 3.0
"""A spread of rewards is worth ranking from so many noise floors on."""
SHARE_OF_BEST = 0.5
"""A step is left out where its correlation with held-out rewards, or all of the interval of its signal to noise, is
below this share of the best step's."""
GOOD_RANKS = 0.95
"""Tails are good enough from this rank correlation on, at the lower end of its interval."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A step, and why it is left out; empty if it is not."""

    step: int
    stop: int
    worth: float
    against: str


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way to make steps random.

    Attributes:
      name: of the kernel and how it spans steps.
      settings: keys of E-GRPO's section `plan` that make it so.
      verdicts: on each step.
      worth: the mean over the steps that stay of signal to noise times correlation with held-out rewards; 0 if none.
      error: its standard error, by the intervals of signal to noise.
    """

    name: str
    settings: Mapping[str, Any]
    verdicts: Sequence[Verdict]
    worth: float
    error: float

    @property
    def active(self) -> tuple[int, ...]:
        """The steps to make random."""
        return tuple(verdict.step for verdict in self.verdicts if not verdict.against)


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """The choice that is recommended, all that there are, and a tail with the number that speaks for it."""

    choice: Choice
    choices: Sequence[Choice]
    because: str
    tail: str
    tail_because: str


def heldout_correlation(step: StepStudy, train: Sequence[str], heldout: Sequence[str]) -> float:
    """The mean over training and held-out rewards of their correlations within groups; 1 if there is none to see."""
    found = [step.rewards[name].correlations[other].value for name in train for other in heldout]
    finite = [value for value in found if math.isfinite(value)]
    return float(np.mean(finite)) if finite else (0.0 if found else 1.0)


def recommend(forms: Sequence[FormStudy], train: Sequence[str], heldout: Sequence[str]) -> Recommendation:
    """The first choice, the config's own, unless another one is better by more than both may be off."""
    choices = [choice for form in forms for choice in _choices(form, train, heldout)]
    own = choices[0]
    best = max(choices, key=lambda choice: choice.worth)
    apart = math.hypot(best.error, own.error)
    if best is own:
        because = f"its steps that stay are worth {own.worth:.4f} on average, the most of all"
    elif own.active and not best.worth - own.worth > 2 * apart:
        because = (
            f"its steps that stay are worth {own.worth:.4f} on average; {best.name} has {best.worth:.4f}, which is not "
            f"more by two standard errors of the difference, {2 * apart:.4f}"
        )
        best = own
    else:
        because = f"its steps that stay are worth {best.worth:.4f} on average, those of {own.name} {own.worth:.4f}"
    tail, tail_because = _tail(forms[0])
    return Recommendation(best, choices, because, tail, tail_because)


def _choices(form: FormStudy, train: Sequence[str], heldout: Sequence[str]) -> list[Choice]:
    """Merged steps where there are longer ones, and every step alone."""
    single = [step for step in form.steps if step.branch.merge == 1]
    merged = {step.branch.step: step for step in form.steps if step.branch.merge > 1}
    judge = lambda name, settings, steps: _choice(name, settings, form, steps, train, heldout)
    if not merged:
        return [judge(form.name, form.settings, single)]
    longest = [merged.get(step.branch.step, step) for step in single]
    return [
        judge(f"{form.name}, merged", form.settings, longest),
        judge(f"{form.name}, single steps", {**form.settings, "entropy_threshold": 0.0}, single),
    ]


def _choice(
    name: str,
    settings: Mapping[str, Any],
    form: FormStudy,
    steps: Sequence[StepStudy],
    train: Sequence[str],
    heldout: Sequence[str],
) -> Choice:
    """A verdict on each of `steps`, beside the best of them."""
    seen = [heldout_correlation(step, train, heldout) for step in steps]
    signals = [step.gradient.ratio for step in steps]
    best_seen = max(seen)
    best_signal = max((signal.value for signal in signals if math.isfinite(signal.value)), default=math.nan)
    verdicts = []
    for step, correlation, signal in zip(steps, seen, signals, strict=True):
        reasons = []
        if step.next_time == 0:
            reasons.append("it ends at t = 0: its noise stays in the image")
        for reward in train:
            spread, floor = step.rewards[reward].spread.value, max(form.floors[reward])
            if not spread > ABOVE_FLOOR * floor:
                reasons.append(
                    f"the spread of {reward}, {spread:.2g}, is not {ABOVE_FLOOR:g} noise floors of {floor:.2g}"
                )
        if not correlation >= SHARE_OF_BEST * best_seen:
            reasons.append(f"correlation with held-out rewards {correlation:.2f}, the best step's is {best_seen:.2f}")
        if not math.isfinite(signal.value):
            reasons.append("no gradient")
        elif math.isfinite(signal.high) and not signal.high >= SHARE_OF_BEST * best_signal:
            reasons.append(f"signal to noise below {signal.high:.4f}, the best step's is {best_signal:.4f}")
        worth = signal.value * correlation
        verdicts.append(Verdict(step.branch.step, step.branch.stop, worth, "; ".join(reasons)))
    stay = [not verdict.against for verdict in verdicts]
    worths = np.array([verdict.worth for verdict in verdicts])[stay]
    halves = np.array([c * (s.high - s.low) / 2 for c, s in zip(seen, signals, strict=True)])[stay]
    error = float(np.sqrt((halves**2).sum()) / len(halves) / 2) if len(halves) else 0.0
    return Choice(name, settings, verdicts, float(worths.mean()) if len(worths) else 0.0, error)


def _tail(form: FormStudy) -> tuple[str, str]:
    """The cheapest tail that is good enough, and why."""
    good = [tail for tail in form.tails if tail.passes < 1 and tail.ranks.low >= GOOD_RANKS]
    if good:
        best = min(good, key=lambda tail: tail.passes)
        low = f"at least {best.ranks.low:.3f}"
        return (
            best.name,
            f"rank correlation {best.ranks.value:.3f} ({low}) with full tails at {best.passes:.0%} of them",
        )
    tried = [tail for tail in form.tails if tail.passes < 1]
    if not tried:
        return "full", "there are none with fewer passes"
    nearest = max(tried, key=lambda tail: tail.ranks.value)
    return "full", (
        f"none with fewer passes has a rank correlation of at least {GOOD_RANKS}: the nearest, {nearest.name}, has "
        f"{nearest.ranks.value:.3f}, at least {nearest.ranks.low:.3f}"
    )
