"""The page, the JSON record and the figure of an analysis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from egrpo_jax.analysis.estimates import Estimate
from egrpo_jax.analysis.recommend import GOOD_RANKS, Choice, Recommendation, heldout_correlation
from egrpo_jax.analysis.study import FormStudy, StepStudy
from egrpo_jax.figures.analysis import Bar, Line, Panel, analysis_figure

LEGEND = """\
- **e^(h/d)**: the entropy of the step's kernel, √(2πe) std.
- **attention**: the mean entropy of the model's attention weights at the anchor's states, by that of uniform weights.
- **images**, **spread**: how far apart images, and rewards, are within a group where this step alone is random.
- **odd**: the share of that variance which changes its sign with the noise, what a gradient can use; the rest is
  curvature.
- **held out**: correlation within groups with held-out rewards, the mean over these: what of the reward others see too.
- **signal/noise**: E⟨g₁, g₂⟩ / (E|g|² - E⟨g₁, g₂⟩) of the policy gradients of independent rollouts, of this step
  alone, in groups of one of each pair.
- **|g|**: their root mean square. **κ** = J/std: what a unit of the noise weighs in the loss as it is.
- Brackets are 95 % intervals of the jackknife over rollouts, for these prompts; of tails over prompts and rollouts.
"""


def as_json(value: Any) -> Any:
    """Dataclasses and named tuples as dicts, nan and infinity as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {key: as_json(part) for key, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(
    forms: Sequence[FormStudy], advice: Recommendation, train: Sequence[str], heldout: Sequence[str], about: str
) -> str:
    """The page, in Markdown."""
    parts = ["# Analysis of random steps", about, "## Recommended", _advice(advice), LEGEND]
    for form in forms:
        parts += [f"## {form.name}", _steps(form, train, heldout), _floors(form), _tails(form)]
    parts += ["## Why steps are left out", *(_verdicts(choice) for choice in advice.choices)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _advice(advice: Recommendation) -> str:
    choice = advice.choice
    lines = [
        f"- **Active steps: {', '.join(map(str, choice.active)) or 'none'}** of {choice.name}: {advice.because}.",
        f"- **Tail: {advice.tail}**: {advice.tail_because}.",
    ]
    if choice.active:
        flags = {"active_steps": choice.active, **choice.settings}
        lines.append("- As flags of `egrpo`: `" + " ".join(f'--config.plan.{k}="{v}"' for k, v in flags.items()) + "`")
    return "\n".join(lines)


def _steps(form: FormStudy, train: Sequence[str], heldout: Sequence[str]) -> str:
    head = ["step", "to", "t", "t'", "std", "e^(h/d)", "attention", "images"]
    of_reward = [f"{kind} {name}" if len(train) > 1 else kind for name in train for kind in ("spread", "odd")]
    lines = [[*head, *of_reward, "held out", "signal/noise", "|g|", "κ"]]
    lines.append(["---:"] * len(lines[0]))
    for step in form.steps:
        rewards = [step.rewards[name] for name in train]
        own = [show(estimate) for reward in rewards for estimate in (reward.spread, reward.odd_share)]
        seen = f"{heldout_correlation(step, train, heldout):.2f}" if heldout else "none"
        lines.append(
            [*_place(step), *own, seen, show(step.gradient.ratio), f"{step.gradient.norm:.2g}", f"{step.kappa:.3f}"]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _place(step: StepStudy) -> list[str]:
    branch = step.branch
    numbers = (step.time, step.next_time, step.std, branch.exp_entropy, step.attention, step.distance)
    return [
        str(branch.step),
        str(branch.stop),
        *("none" if math.isnan(number) else f"{number:.3f}" for number in numbers),
    ]


def show(estimate: Estimate) -> str:
    """A number and its interval, to three digits."""
    if math.isnan(estimate.value):
        return "none"
    return f"{estimate.value:.3g} [{estimate.low:.2g}, {estimate.high:.2g}]"


def _floors(form: FormStudy) -> str:
    lines = [
        f"Noise floor of {name}: {floor.rounding:.2g} by rounding images to 8 bits, {floor.perturbation:.2g} by noise "
        f"as large, {floor.batch:.2g} by passes of another batch."
        for name, floor in form.floors.items()
    ]
    return "\n".join(lines)


def _tails(form: FormStudy) -> str:
    lines = ["| tail | passes | rank correlation with full tails |", "|---|---:|---:|"]
    lines += [f"| {tail.name} | {tail.passes:.0%} | {show(tail.ranks)} |" for tail in form.tails]
    return "\n".join(lines)


def _verdicts(choice: Choice) -> str:
    lines = [f"**{choice.name}**, worth {choice.worth:.4f} (standard error {choice.error:.4f})", ""]
    lines += [
        f"- step {verdict.step} to {verdict.stop}, worth {verdict.worth:.4f}: {verdict.against or 'stays'}"
        for verdict in choice.verdicts
    ]
    return "\n".join(lines)


def draw(forms: Sequence[FormStudy], train: Sequence[str], heldout: Sequence[str], path: Path) -> None:
    """The figure. Raises UserError if `path` cannot be written."""
    reward = train[0]
    ways = {name: steps for form in forms for name, steps in _ways(form).items()}
    exact = lambda value: Estimate(value, math.nan, math.nan)
    panel = lambda title, of, **more: Panel(title, {name: _line(steps, of) for name, steps in ways.items()}, **more)
    floor = max(max(form.floors[reward]) for form in forms)
    panels = [
        panel("e^(h/d)", lambda step: exact(step.branch.exp_entropy)),
        panel(f"spread of {reward}", lambda step: step.rewards[reward].spread, level=floor, level_name="noise floor"),
        panel("odd share of its variance", lambda step: step.rewards[reward].odd_share),
        panel("spread of images", lambda step: exact(step.distance)),
        panel("entropy of attention, by uniform", lambda step: exact(step.attention)),
        panel("signal to noise of the gradient", lambda step: step.gradient.ratio, level=0.0),
        panel("root mean square of the gradient", lambda step: exact(step.gradient.norm), log=True),
    ]
    if heldout:
        seen = lambda step: step.rewards[reward].correlations[heldout[0]]
        panels.insert(4, panel(f"correlation with {heldout[0]}", seen))
    bars = [Bar(f"{tail.name} ({tail.passes:.0%})", *tail.ranks) for tail in forms[0].tails]
    analysis_figure(panels, bars, f"ranks of tails, {forms[0].name}", GOOD_RANKS, path)


def _ways(form: FormStudy) -> dict[str, list[StepStudy]]:
    single = [step for step in form.steps if step.branch.merge == 1]
    merged = [step for step in form.steps if step.branch.merge > 1]
    return {form.name: single} | ({f"{form.name}, merged": merged} if merged else {})


def _line(steps: Sequence[StepStudy], of: Callable[[StepStudy], Estimate]) -> Line:
    found = [of(step) for step in steps]
    columns = zip(*found, strict=True)
    return Line([step.branch.step for step in steps], *columns)
