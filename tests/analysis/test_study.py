"""An analysis of a flow and rewards that have closed forms."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from egrpo_jax.analysis.probe import forms
from egrpo_jax.analysis.recommend import recommend
from egrpo_jax.analysis.study import Sizes, count_work, study_form
from egrpo_jax.parallel.mesh import make_mesh
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.training.job import make_job
from tests.analysis import planted

PAIRS, PROMPTS, REPLICATES = 32, 4, 24


@functools.cache
def study(model="pipeline", reward="linear", heldout=(), replicates=REPLICATES, **plan):
    config = planted.config(model, reward, heldout, **plan)
    config = dataclasses.replace(config, learner=LearnerConfig(updates="per_active_step"))
    mesh, pieces = make_mesh(config.mesh), []
    kernels = forms(config.plan, PAIRS)
    sizes = Sizes(replicates, 2)
    with jax.set_mesh(mesh):
        job = make_job(config, mesh)
        params = job.pipeline.load(mesh)
        prompts = [f"prompt {i}" for i in range(PROMPTS)]
        done = [study_form(job, form, params, params, prompts, sizes, lambda: pieces.append(1)) for form in kernels]
    assert len(pieces) == sum(count_work(form, sizes) for form in kernels)
    return config, kernels, done


def cases():
    """Every step of every kernel, with the numbers of its kernel restated: std, J, and the factor of the mean."""
    config, kernels, done = study()
    for form, found in zip(kernels, done, strict=True):
        for index, step in enumerate(found.steps):
            branch, times = step.branch, config.plan.times
            t, end = times[branch.step], times[branch.stop]
            if form is kernels[0]:  # Flow-GRPO's
                g = 0.7 * math.sqrt(t / (1 - (times[branch.step + 1] if t == 1 else t)))
                std = g * math.sqrt(t - end)
                pull = (t - end) * g**2 / (2 * t)
            else:
                std = min(2.2 / math.sqrt(2 * math.pi * math.e), end)
                pull = end - math.sqrt(end**2 - std**2)
            c = planted.GROWTH
            factor = 1 - (t - end) * c - pull * (1 + (1 - t) * c)
            jacobian = (t - end) + pull * (1 - t)
            walk = lambda first, last, c=c: np.prod([1 - (times[i] - times[i + 1]) * c for i in range(first, last)])
            before, after = walk(0, branch.step), walk(branch.stop, len(times) - 1)
            yield index, form, step, std, jacobian / std, abs(after) * std, abs(before * factor * after)


def covers(estimate, expected, slack=0.03):
    """Within half as much again as the interval, and a little."""
    half = 1.5 * (estimate.high - estimate.low) / 2 + slack * abs(expected)
    return abs(estimate.value - expected) <= half


def test_steps_are_those_of_the_grid_and_their_merges():
    _, kernels, done = study()
    for form, found in zip(kernels, done, strict=True):
        assert [step.branch.step for step in found.steps if step.branch.merge == 1] == [0, 1, 2, 3, 4]
        assert [step.branch for step in found.steps] == list(form.plan.branches)
    merged = [step.branch for step in done[0].steps if step.branch.merge > 1]
    assert merged
    assert all(branch.exp_entropy >= 2.2 or branch.clamped for branch in merged)
    assert all(step.branch.merge == 1 for step in done[1].steps)


def test_std_and_kappa():
    for _, _, step, std, kappa, _, _ in cases():
        np.testing.assert_allclose((step.std, step.kappa), (std, kappa), rtol=1e-6)
        np.testing.assert_allclose(step.branch.exp_entropy, math.sqrt(2 * math.pi * math.e) * std, rtol=1e-6)


def test_spread_and_share_of_a_linear_reward():
    for _, _, step, _, _, spread, _ in cases():
        (reward,) = step.rewards.values()
        assert covers(reward.spread, planted.SLOPE * spread / math.sqrt(planted.SIZE))
        assert reward.odd_share.value == pytest.approx(1, abs=1e-3)
        assert step.distance == pytest.approx(planted.SCALE * spread, rel=0.1)


def test_odd_share_of_a_quadratic_reward():
    """Var odd = s^2 (b^2 + 4 q^2 m^2) / d and Var even = 2 q^2 s^4 / d, m^2 being the variance of where a group is."""
    expected = list(cases())
    _, _, done = study(reward="quadratic")
    shares = []
    for index, form, *_, spread, middle in expected:
        found = done[0 if form.name == done[0].name else 1].steps[index]
        (reward,) = found.rewards.values()
        odd = spread**2 * (planted.SLOPE**2 + 4 * planted.BEND**2 * middle**2)
        even = 2 * planted.BEND**2 * spread**4
        shares.append(odd / (odd + even))
        assert covers(reward.odd_share, odd / (odd + even))
        assert covers(reward.spread, math.sqrt((odd + even) / planted.SIZE))
    assert min(shares) < 0.95


def test_agreement_of_gradients():
    """A = b e / (|b| s) for unit noise e of std s in its group, so that E g = kappa E[s] b / (|b| d), with E[s] =
    1 - 3 / (4 G); of P G samples the variance of g is kappa^2 (d - 1 + 1/2) / (d^2 P G)."""
    signal, noise = (1 - 3 / (4 * PAIRS)) ** 2, (planted.SIZE - 0.5) / (PROMPTS * PAIRS)
    for _, _, step, _, kappa, _, _ in cases():
        assert covers(step.gradient.ratio, signal / noise, slack=0.1)
        assert step.gradient.norm == pytest.approx(kappa / planted.SIZE * math.sqrt(signal + noise), rel=0.05)


def test_correlation_with_another_reward():
    """Of half of the pixels: 1 / sqrt(2)."""
    _, _, done = study(heldout=("judge",), replicates=8)
    for step in done[0].steps:
        (reward,) = step.rewards.values()
        assert covers(reward.correlations["tests.analysis.planted:judge"], math.sqrt(0.5))


def test_floors():
    """A rounding to 8 bits moves a pixel by 1 / (255 sqrt(12)), independently of the others."""
    _, _, done = study()
    expected = 1 / (255 * math.sqrt(12)) / planted.SCALE / math.sqrt(planted.SIZE)
    for found in done:
        (floor,) = found.floors.values()
        assert floor.rounding == pytest.approx(expected, rel=0.1)
        assert floor.perturbation == pytest.approx(expected, rel=0.1)
        assert floor.batch < 1e-5


def test_ranks_of_tails():
    """A linear flow's tails all end at a multiple of their start: no solver changes the order."""
    _, _, done = study()
    names = {tail.name: tail for tail in done[0].tails}
    assert names["base weights"].ranks.value == pytest.approx(1)
    assert names["Euler, stride 2"].ranks.value == pytest.approx(1, abs=0.01)
    assert names["Euler, stride 2"].passes < names["base weights"].passes == 1


def advice(model, reward="linear"):
    config, _, done = study(model, reward, replicates=6)
    return recommend(done, config.rewards.train, config.rewards.heldout)


def test_all_steps_are_recommended_where_all_are_alike():
    config, _, done = study()
    found = recommend(done, config.rewards.train, ())
    assert found.choice.active[:3] == (0, 1, 2)
    assert "rank correlation 1.000" in found.tail_because


def test_late_steps_are_recommended_where_early_ones_are_forgotten():
    """All noise before t = 0.8 is gone at the end."""
    found = advice("forgetful")
    times = planted.config().plan.times
    kept = [step for step, end in enumerate(times[1:]) if step < 5 and end <= planted.FORGOTTEN]
    assert set(found.choice.active) <= set(kept)
    assert found.choice.active
    assert "noise floors" in found.choice.verdicts[0].against


def test_no_step_is_recommended_below_the_floor():
    found = advice("faint", "of_faint")
    assert found.choice.active == ()
    assert all("noise floors" in verdict.against for verdict in found.choice.verdicts)
