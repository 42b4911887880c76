"""Updates: shared against separate forwards, joint and by step, accumulation, averages, what is not finite."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.flow.process import FlowSde
from egrpo_jax.flow.transition import log_prob
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.deal import deal_states, deal_tails
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.loss import clipped_ratio_loss
from egrpo_jax.rl.objective import Scored, policy_loss, score_samples
from egrpo_jax.rl.optimizer import OptimConfig, last_learning_rate, make_optimizer, make_schedule
from egrpo_jax.rl.rollout import roll_out
from egrpo_jax.rl.transitions import prompt_keys
from egrpo_jax.rl.update import init_state, policy_gradient, score_batch, take_batch, update_policy
from tests import toy

PARAMS, TEXT = toy.params(), toy.conditioning(4)
PLAN = EGrpo(num_steps=8, group_size=5).make_plan()
KEYS = prompt_keys(jax.random.key(0), 0, 4)
TRANSITIONS = roll_out(toy.velocity, PARAMS, PLAN, deal_tails(PLAN, 4, 1), TEXT, KEYS, toy.SHAPE).transitions[0]
ADVANTAGE = jax.random.normal(jax.random.key(1), TRANSITIONS.log_prob.shape)
OPTIM = OptimConfig(learning_rate=1e-3)


def run(config, optim=OPTIM, steps=1, params=PARAMS, advantage=ADVANTAGE, transitions=TRANSITIONS, **given):
    optimizer = given.get("optimizer") or make_optimizer(optim)
    state, stats = given.get("state") or init_state(params, optimizer, config), None
    update = jax.jit(functools.partial(update_alone, config, optimizer))
    for _ in range(steps):
        state, stats = update(state, transitions, advantage)
    return state, stats


def update_alone(config, optimizer, state, transitions, advantage):
    """The update of one worker."""
    states = deal_states(*advantage.shape[:2], 1, config.updates_of_epoch(advantage.shape[1]), config.micro_batch)
    score = functools.partial(score_batch, toy.velocity, PLAN.objective(config))
    gradient = functools.partial(policy_gradient, toy.velocity, PLAN.objective(config))
    return update_policy(
        lambda params, batch: score(params, TEXT, batch),
        lambda params, batch: gradient(params, TEXT, batch),
        optimizer,
        config,
        state,
        (take_batch(transitions, advantage, PLAN.step_weights(config.step_weights), states),),
    )


def moved(seed=3):
    """Parameters a little off those that sampled, so that ratios are not 1."""
    return jax.tree.map(lambda p, q: p + 0.02 * q, PARAMS, toy.params(seed))


def loss_of(params, transitions, advantage, text, config):
    scored = score_samples(toy.velocity, PLAN.process, params, transitions, text)
    return policy_loss(config, scored, Scored(transitions.log_prob, None), advantage)[0]


@pytest.mark.parametrize("params", [PARAMS, moved()], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize("step", range(4))
def test_one_shared_forward_equals_separate_forwards(params, step):
    transitions, advantage = jax.tree.map(lambda x: x[:, step], TRANSITIONS), ADVANTAGE[:, step]
    shared = jax.grad(lambda p: loss_of(p, transitions, advantage, TEXT, LearnerConfig(clip_range=5e-3)))(params)

    def separate(p):
        """Every sample as a state of its own."""
        repeat = lambda x: jnp.repeat(x, 5, axis=0)
        time = repeat(transitions.time)
        latents, text = repeat(transitions.latents), {"text": repeat(TEXT["text"])}
        kernel = FlowSde().kernel(
            latents,
            toy.velocity(p, latents, time, text),
            time,
            repeat(transitions.next_time),
            repeat(transitions.noise),
        )
        scored = log_prob(kernel, transitions.next_latents.reshape(-1, *toy.SHAPE)).reshape(4, 5)
        ratio = jnp.exp(scored - transitions.log_prob)
        return clipped_ratio_loss(ratio, jnp.clip(advantage, -5.0, 5.0), 5e-3).loss.mean()

    expected = jax.grad(separate)(params)
    scale = optax.tree.norm(expected)
    assert optax.tree.norm(optax.tree.sub(shared, expected)) <= 1e-6 * scale


def test_ratio_is_one_before_the_first_update():
    for updates in ("joint", "per_active_step"):
        _, stats = run(LearnerConfig(updates=updates))
        assert stats.loss.ratio_deviation[0] <= 1e-6
        np.testing.assert_allclose(stats.loss.ratio_excess[0], 0.0, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"process": name, "entropy_threshold": 0.0} for name in ("dance_sde", "cps", "exact_sde")]
    + [{"process": name, "entropy_by": "noise"} for name in ("flow_sde", "exact_sde")],
)
def test_ratio_is_one_with_every_process_and_its_gradient_that_of_the_gaussian(changes):
    plan = EGrpo(num_steps=8, group_size=5, **changes).make_plan()
    rollout = roll_out(toy.velocity, PARAMS, plan, deal_tails(plan, 4, 1), TEXT, KEYS, toy.SHAPE)
    for step, branch in enumerate(plan.branches):
        transitions = jax.tree.map(lambda x, step=step: x[:, step], rollout.transitions[0])

        def scored(params, transitions=transitions):
            return score_samples(toy.velocity, plan.process, params, transitions, TEXT).log_prob

        chex.assert_trees_all_close(scored(PARAMS), transitions.log_prob, atol=1e-6)
        # d log p / d v = J (x' - mean) / std^2 / (N D), with the plan's own J and std.
        moments = plan.times[branch.step], plan.times[branch.stop], branch.noise
        factor = -plan.process.jacobian(*moments) / plan.process.std(*moments) ** 2 / np.prod(toy.SHAPE)
        kernel = plan.process.kernel(
            transitions.latents,
            toy.velocity(PARAMS, transitions.latents, transitions.time, TEXT),
            transitions.time,
            transitions.next_time,
            transitions.noise,
        )
        pull = factor * (transitions.next_latents - kernel.mean[:, None]).sum(1)
        expected = jax.vjp(lambda p: toy.velocity(p, transitions.latents, transitions.time, TEXT), PARAMS)[1](pull)[0]
        found = jax.grad(lambda p: scored(p).sum())(PARAMS)
        chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-5)


def test_later_active_steps_are_off_policy():
    _, stats = run(LearnerConfig(updates="per_active_step"))
    assert stats.loss.ratio_deviation.shape == (4,)
    assert (stats.loss.ratio_deviation[1:] > 1e-5).all()


def by_hand(updates, config):
    """The update rule restated: plain Python loops over states."""
    optimizer = make_optimizer(OPTIM)
    params, opt_state = PARAMS, make_optimizer(OPTIM).init(PARAMS)
    groups = [[0], [1], [2], [3]] if updates == "per_active_step" else [[0, 1, 2, 3]]
    for group in groups:
        total = jax.tree.map(jnp.zeros_like, params)
        for step in group:
            for k in range(4):
                transitions = jax.tree.map(lambda x: x[k : k + 1, step], TRANSITIONS)
                advantage, text = ADVANTAGE[k : k + 1, step], {"text": TEXT["text"][k : k + 1]}
                grad = jax.grad(lambda p: loss_of(p, transitions, advantage, text, config))(params)
                total = jax.tree.map(lambda a, b: a + b / (4 * len(group)), total, grad)
        updates, opt_state = optimizer.update(total, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("updates", ["joint", "per_active_step"])
@pytest.mark.parametrize("micro_batch", [None, 1, 2, 3])  # 3 do not divide 4 states, nor 16
def test_updates_and_accumulation_equal_plain_loops(updates, micro_batch):
    config = LearnerConfig(updates=updates, micro_batch=micro_batch)
    state, stats = run(config)
    chex.assert_trees_all_close(state.params, by_hand(updates, config), atol=2e-6)
    assert stats.grad_norm.shape == ((1,) if updates == "joint" else (4,))


def test_moving_average():
    state, _ = run(LearnerConfig(ema_decay=0.9))
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, PARAMS, state.params)
    chex.assert_trees_all_close(state.ema, expected, atol=1e-6)
    assert run(LearnerConfig())[0].ema is None


def test_old_log_probabilities_are_those_of_the_updates_own_forward_pass():
    """Whatever rounding the rollout's have, the ratio is 1 before the first update, and the rounding is measured."""
    rounded = TRANSITIONS._replace(log_prob=TRANSITIONS.log_prob + 3e-4)
    for updates in ("joint", "per_active_step"):
        config = LearnerConfig(updates=updates)
        (state, stats), (exact, _) = run(config, transitions=rounded), run(config)
        np.testing.assert_allclose(stats.loss.ratio_excess[0], 0.0, atol=1e-7)
        np.testing.assert_allclose(stats.rollout_deviation[0], 3e-4, rtol=2e-2)
        chex.assert_trees_all_equal(state.params, exact.params)


def infinite(optimizer):
    def update(grads, state, params):
        updates, state = optimizer.update(grads, state, params)
        return optax.tree.scale(jnp.inf, updates), state

    return optax.GradientTransformation(optimizer.init, update)


POISON = {
    "advantage": {"advantage": ADVANTAGE.at[2, 1, 3].set(jnp.nan)},
    "sample": {"transitions": TRANSITIONS._replace(latents=TRANSITIONS.latents.at[0, 0, 0, 0].set(jnp.inf))},
    "update": {"optimizer": infinite(make_optimizer(OPTIM))},  # of a finite gradient
}


@pytest.mark.parametrize("poison", POISON)
def test_what_would_not_leave_everything_finite_is_skipped_and_counted(poison):
    state, _ = run(LearnerConfig(ema_decay=0.5), steps=2)
    skipped, _ = run(LearnerConfig(ema_decay=0.5), state=state, **POISON[poison])
    chex.assert_trees_all_equal(skipped.params, state.params)
    chex.assert_trees_all_equal(skipped.opt_state, state.opt_state)
    assert [int(count) for count in skipped.skipped] == [1, 1]
    recovered, _ = run(LearnerConfig(ema_decay=0.5), state=skipped)
    assert [int(count) for count in recovered.skipped] == [0, 1]
    chex.assert_trees_all_equal(recovered.params, run(LearnerConfig(ema_decay=0.5), state=state)[0].params)


def test_parameters_that_would_overflow_what_they_are_stored_in_are_not_kept():
    half = jax.tree.map(lambda p: jnp.full_like(p, 3e38, jnp.bfloat16), PARAMS)
    doubling = optax.stateless(lambda _, params: jax.tree.map(lambda p: p.astype(jnp.float32), params))
    state, _ = run(LearnerConfig(), params=half, advantage=0 * ADVANTAGE, optimizer=doubling)
    chex.assert_trees_all_equal(state.params, half)
    assert int(state.skipped.in_a_row) == 1


def test_a_step_lowers_the_loss():
    """After an update the samples of positive advantage are more probable relative to those of negative advantage."""
    config = LearnerConfig(clip_range=1.0)
    state, _ = run(config, optim=OptimConfig(learning_rate=1e-4))
    before = policy_gain(PARAMS)
    assert policy_gain(state.params) > before


def policy_gain(params):
    config = LearnerConfig(clip_range=1.0)
    losses = [
        loss_of(params, jax.tree.map(lambda x, i=i: x[:, i], TRANSITIONS), ADVANTAGE[:, i], TEXT, config)
        for i in range(4)
    ]
    return -float(sum(losses))


def test_warmup():
    schedule = make_schedule(OptimConfig(learning_rate=1e-3, warmup_updates=4))
    np.testing.assert_allclose([schedule(i) for i in (0, 2, 4, 9)], [2.5e-4, 6.25e-4, 1e-3, 1e-3], rtol=1e-6)
    assert make_schedule(OptimConfig(learning_rate=1e-3))(0) == 1e-3


def test_the_last_learning_rate_is_that_of_the_last_update_that_was_applied():
    optim = OptimConfig(learning_rate=1e-3, warmup_updates=4)
    state, _ = run(LearnerConfig(), optim, steps=2)
    np.testing.assert_allclose(last_learning_rate(state.opt_state), 4.375e-4, rtol=1e-6)
    skipped, _ = run(LearnerConfig(), optim, state=state, advantage=ADVANTAGE * jnp.nan)
    np.testing.assert_allclose(last_learning_rate(skipped.opt_state), 4.375e-4, rtol=1e-6)


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
