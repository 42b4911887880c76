"""Updates: shared against separate forwards, schedules, accumulation, averages, what is not finite."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.flow.transition import log_prob, sde_kernel
from egrpo_jax.rl.loss import clipped_ratio_loss
from egrpo_jax.rl.optimizer import OptimConfig, make_optimizer, make_schedule, skipped_updates
from egrpo_jax.rl.plan import PlanConfig, make_plan
from egrpo_jax.rl.rollout import prompt_keys, roll_out
from egrpo_jax.rl.update import LearnerConfig, init_state, policy_loss, update
from tests import toy

PARAMS, TEXT = toy.params(), toy.conditioning(4)
PLAN = make_plan(PlanConfig(num_steps=8, group_size=5))
TRANSITIONS = roll_out(toy.velocity, PARAMS, PLAN, TEXT, prompt_keys(jax.random.key(0), 0, 4), toy.SHAPE).transitions
ADVANTAGE = jax.random.normal(jax.random.key(1), TRANSITIONS.log_prob.shape)
OPTIM = OptimConfig(learning_rate=1e-3)


def run(config, optim=OPTIM, advantage=ADVANTAGE, params=PARAMS, steps=1):
    optimizer = make_optimizer(optim)
    state, stats = init_state(params, optimizer, config), None
    step = jax.jit(functools.partial(update, toy.velocity, optimizer, config))
    for _ in range(steps):
        state, stats = step(state, TRANSITIONS, advantage, TEXT)
    return state, stats


def moved(seed=3):
    """Parameters a little off those that sampled, so that ratios are not 1."""
    return jax.tree.map(lambda p, q: p + 0.02 * q, PARAMS, toy.params(seed))


@pytest.mark.parametrize("params", [PARAMS, moved()], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize("step", range(4))
def test_one_shared_forward_equals_separate_forwards(params, step):
    transitions, advantage = jax.tree.map(lambda x: x[step], TRANSITIONS), ADVANTAGE[step]
    config = LearnerConfig(clip_range=5e-3)
    shared = jax.grad(lambda p: policy_loss(toy.velocity, p, transitions, advantage, TEXT, config)[0])(params)

    def separate(p):
        """Every sample as a state of its own."""
        repeat = lambda x: jnp.repeat(x, 5, axis=0)
        time = repeat(transitions.time)
        latents, text = repeat(transitions.latents), {"text": repeat(TEXT["text"])}
        kernel = sde_kernel(
            latents,
            toy.velocity(p, latents, time, text),
            time,
            repeat(transitions.next_time),
            repeat(transitions.sigma),
        )
        scored = log_prob(kernel, transitions.next_latents.reshape(-1, *toy.SHAPE)).reshape(4, 5)
        return clipped_ratio_loss(scored, transitions.log_prob, advantage, 5e-3, 5.0)[0]

    expected = jax.grad(separate)(params)
    scale = optax.tree.norm(expected)
    assert optax.tree.norm(optax.tree.sub(shared, expected)) <= 1e-6 * scale


def test_ratio_is_one_before_the_first_update():
    for schedule in ("joint", "per_active_step"):
        _, stats = run(LearnerConfig(schedule=schedule))
        assert stats.loss.ratio_deviation[0] <= 1e-6
        np.testing.assert_allclose(stats.loss.ratio[0], 1.0, atol=1e-6)


def test_later_active_steps_are_off_policy():
    _, stats = run(LearnerConfig(schedule="per_active_step"))
    assert stats.loss.ratio_deviation.shape == (4,)
    assert (stats.loss.ratio_deviation[1:] > 1e-5).all()


def by_hand(schedule, config):
    """The update rule restated: plain Python loops over states."""
    optimizer = make_optimizer(OPTIM)
    params, opt_state = PARAMS, make_optimizer(OPTIM).init(PARAMS)
    groups = [[0], [1], [2], [3]] if schedule == "per_active_step" else [[0, 1, 2, 3]]
    for group in groups:
        total = jax.tree.map(jnp.zeros_like, params)
        for step in group:
            for k in range(4):
                transitions = jax.tree.map(lambda x: x[step, k : k + 1], TRANSITIONS)
                text = {"text": TEXT["text"][k : k + 1]}
                grad = jax.grad(
                    lambda p: policy_loss(toy.velocity, p, transitions, ADVANTAGE[step, k : k + 1], text, config)[0]
                )(params)
                total = jax.tree.map(lambda a, b: a + b / (4 * len(group)), total, grad)
        updates, opt_state = optimizer.update(total, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("schedule", ["joint", "per_active_step"])
@pytest.mark.parametrize("micro_batch", [None, 1, 2])
def test_schedules_and_accumulation_equal_plain_loops(schedule, micro_batch):
    config = LearnerConfig(schedule=schedule, micro_batch=micro_batch)
    state, stats = run(config)
    chex.assert_trees_all_close(state.params, by_hand(schedule, config), atol=2e-6)
    assert stats.grad_norm.shape == ((1,) if schedule == "joint" else (4,))


def test_a_micro_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"learner\.micro_batch: found 3, expected a divisor of the 4 prompts"):
        run(LearnerConfig(micro_batch=3))


def test_moving_average():
    state, _ = run(LearnerConfig(ema_decay=0.9))
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, PARAMS, state.params)
    chex.assert_trees_all_close(state.ema, expected, atol=1e-6)
    assert run(LearnerConfig())[0].ema is None


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf], ids=["reward_nan", "ratio_overflow"])
def test_what_is_not_finite_is_skipped_and_counted(bad):
    state, _ = run(LearnerConfig(), steps=2)
    poisoned, transitions = ADVANTAGE, TRANSITIONS
    if np.isnan(bad):
        poisoned = ADVANTAGE.at[1, 2, 3].set(bad)
    else:
        transitions = TRANSITIONS._replace(log_prob=TRANSITIONS.log_prob.at[0, 0, 0].set(bad))
    update_fn = jax.jit(functools.partial(update, toy.velocity, make_optimizer(OPTIM), LearnerConfig()))
    step = lambda state, advantage, transitions: update_fn(state, transitions, advantage, TEXT)[0]
    skipped = step(state, poisoned, transitions)
    chex.assert_trees_all_equal(skipped.params, state.params)
    chex.assert_trees_all_equal(skipped.opt_state.inner_state, state.opt_state.inner_state)
    assert [int(count) for count in skipped_updates(skipped.opt_state)] == [1, 1]
    recovered = step(skipped, ADVANTAGE, TRANSITIONS)
    assert [int(count) for count in skipped_updates(recovered.opt_state)] == [0, 1]
    chex.assert_trees_all_close(recovered.params, step(state, ADVANTAGE, TRANSITIONS).params)


def test_a_step_lowers_the_loss():
    """After an update the samples of positive advantage are more probable relative to those of negative advantage."""
    config = LearnerConfig(clip_range=1.0)
    state, _ = run(config, optim=OptimConfig(learning_rate=1e-4))
    before = policy_gain(PARAMS)
    assert policy_gain(state.params) > before


def policy_gain(params):
    config = LearnerConfig(clip_range=1.0)
    losses = [
        policy_loss(toy.velocity, params, jax.tree.map(lambda x, i=i: x[i], TRANSITIONS), ADVANTAGE[i], TEXT, config)[0]
        for i in range(4)
    ]
    return -float(sum(losses))


def test_warmup():
    schedule = make_schedule(OptimConfig(learning_rate=1e-3, warmup_updates=4))
    np.testing.assert_allclose([schedule(i) for i in (0, 2, 4, 9)], [2.5e-4, 6.25e-4, 1e-3, 1e-3], rtol=1e-6)
    assert make_schedule(OptimConfig(learning_rate=1e-3))(0) == 1e-3


@pytest.mark.parametrize(
    ("cls", "changes", "key"),
    [
        (LearnerConfig, {"clip_range": 0.0}, "clip_range"),
        (LearnerConfig, {"advantage_clip": -1.0}, "advantage_clip"),
        (LearnerConfig, {"micro_batch": 0}, "micro_batch"),
        (LearnerConfig, {"ema_decay": 1.0}, "ema_decay"),
        (OptimConfig, {"learning_rate": 0.0}, "learning_rate"),
        (OptimConfig, {"b2": 1.0}, "b2"),
        (OptimConfig, {"weight_decay": -1e-4}, "weight_decay"),
        (OptimConfig, {"max_skipped": 0}, "max_skipped"),
    ],
)
def test_wrong_configs_name_the_key(cls, changes, key):
    with pytest.raises(ConfigError, match=rf"^config\.{key}: found "):
        cls(**changes)


def test_storage_of_the_optimizer():
    """bfloat16 for the first moment where asked; the second, and all arithmetic, float32 even for bfloat16 weights."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    optim = OptimConfig(learning_rate=1e-3, first_moment_dtype="bfloat16")
    state, stats = run(LearnerConfig(micro_batch=2), optim, params=half)
    ((_, mu),) = optax.tree.get_all_with_path(state.opt_state, "mu")
    ((_, nu),) = optax.tree.get_all_with_path(state.opt_state, "nu")
    assert {leaf.dtype for leaf in jax.tree.leaves(mu)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(nu)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    assert float(stats.update_norm[0]) > 0
