"""Noise that follows the rewards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.rl.adaptive import REACH, Memory
from egrpo_jax.rl.advantage import spread_within
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.transitions import prompt_keys
from tests import toy

CONFIG = EGrpo(process="exact_sde", entropy_by="noise", num_steps=8, group_size=4, adapt_every=3)
PLAN = CONFIG.make_plan()
BASE = np.array([branch.noise for branch in PLAN.branches])


def after(effect, iterations, plan=PLAN):
    """The noise after iterations in which a step's spread of rewards is `effect` times its noise."""
    memory = plan.begin()
    for _ in range(iterations):
        memory = plan.learn(memory, effect * np.array(memory.noise))
    return memory


def test_spreads_come_to_be_alike_and_the_sum_of_entropies_stays():
    effect = np.array([1.2, 1.0, 0.9, 0.8])
    noise = np.array(after(effect, 60).noise)
    spread = effect * noise
    np.testing.assert_allclose(spread, spread.mean(), rtol=1e-3)
    np.testing.assert_allclose(np.log(noise).sum(), np.log(BASE).sum(), rtol=1e-6)


def test_noise_changes_every_so_many_iterations_by_the_mean_of_these():
    memory = PLAN.begin()
    assert memory.noise == tuple(BASE)
    spreads = np.array([[1.0, 1, 1, 1], [2, 1, 1, np.nan], [3, 1, 1, 4]])
    for spread in spreads[:2]:
        memory = PLAN.learn(memory, spread)
        assert memory.noise == tuple(BASE)
    memory = PLAN.learn(memory, spreads[2])
    logs = np.log(np.nanmean(spreads, 0))
    expected = BASE * np.exp((logs.mean() - logs) / 2)
    np.testing.assert_allclose(memory.noise, expected, rtol=1e-6)
    assert memory[1:] == ((0.0,) * 4, (0,) * 4, 0)
    assert Memory.read([list(part) if isinstance(part, tuple) else part for part in memory]) == memory


def test_it_is_bounded():
    noise = np.array(after(np.array([1.0, 1.0, 1.0, 1e-6]), 300).noise)
    ends = np.array([PLAN.times[branch.stop] for branch in PLAN.branches])
    assert (noise <= np.minimum(REACH * BASE, ends) + 1e-9).all()
    assert (noise >= BASE / REACH - 1e-9).all()
    np.testing.assert_allclose(noise[3], min(REACH * BASE[3], ends[3]))
    assert after(np.zeros(4), 9).noise == tuple(BASE)
    assert after(np.full(4, np.nan), 9).noise == tuple(BASE)


def test_spread_within_groups():
    values = np.arange(24.0).reshape(2, 3, 1, 4) ** 2
    np.testing.assert_allclose(spread_within(values), values.std(-1, ddof=1).mean((0, 2)), rtol=1e-6)
    whole = values[1, 1].std(ddof=1)
    values[0, 1, 0, 2] = values[:, 2, 0, 0] = np.nan
    np.testing.assert_allclose(spread_within(values)[1:], [whole, np.nan], rtol=1e-6)


def test_samples_are_those_of_a_plan_with_that_noise_and_nothing_is_compiled_anew():
    stds = (0.3, 0.4, 0.5, 0.2)
    changed = PLAN.at(PLAN.begin()._replace(noise=stds))
    fixed = EGrpo(process="exact_sde", stds=stds, entropy_threshold=None, num_steps=8, group_size=4).make_plan()
    np.testing.assert_allclose(
        [branch.exp_entropy for branch in changed.branches], [branch.exp_entropy for branch in fixed.branches]
    )
    assert changed.shares_code(PLAN)
    assert not changed.shares_code(fixed)
    np.testing.assert_allclose(changed.step_weights("noise"), fixed.step_weights("noise"))
    keys, text, params, traces = prompt_keys(jax.random.key(0), 0, 2), toy.conditioning(2), toy.params(), []

    @jax.jit
    def roll_out(schedule):
        traces.append(1)
        return PLAN.roll_out(toy.velocity, params, PLAN.deal(2, 1, None), schedule, text, keys, toy.SHAPE)

    rollouts = [roll_out(plan.schedule()) for plan in (PLAN, changed)]
    expected = fixed.roll_out(toy.velocity, params, fixed.deal(2, 1, None), (), text, keys, toy.SHAPE)
    assert len(traces) == 1
    np.testing.assert_allclose(rollouts[1].latents, expected.latents, atol=1e-5)
    np.testing.assert_allclose(rollouts[1].transitions[0].log_prob, expected.transitions[0].log_prob, atol=1e-5)
    assert not jnp.allclose(rollouts[0].latents, expected.latents, atol=1e-2)


def test_only_chosen_noise_can_adapt():
    with pytest.raises(ConfigError, match="adapt_every"):
        EGrpo(adapt_every=5)
    with pytest.raises(ConfigError, match="adapt_every"):
        EGrpo(entropy_by="noise", adapt_every=5)  # of Euler's kernel
