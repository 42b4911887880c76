"""Algorithms without random steps: what they sample, what they learn from it, and from whom."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.flow.transition import kl_divergence
from egrpo_jax.rl.algorithms.awm import Awm
from egrpo_jax.rl.algorithms.diffusion_nft import DiffusionNft
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.algorithms.v_grpo import VGrpo
from egrpo_jax.rl.deal import deal_states
from egrpo_jax.rl.forward import awm_log_density, nft_loss, vgrpo_error
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.objective import score_samples
from egrpo_jax.rl.transitions import prompt_keys
from egrpo_jax.rl.update import init_state, policy_gradient, score_batch, take_batch, update_policy
from tests import toy

PARAMS, OTHER = toy.params(), toy.params(seed=4)
TEXT, KEYS = toy.conditioning(3), prompt_keys(jax.random.key(0), 0, 3)
NAMES = ("diffusion_nft", "awm", "v_grpo")
ADVANTAGE = 2 * jax.random.normal(jax.random.key(9), (3, 1, 4))


def roll(plan, params=PARAMS, velocity=toy.velocity):
    deal = plan.deal(3, 1, None)
    return plan.roll_out(velocity, params, deal, plan.schedule(), TEXT, KEYS, toy.SHAPE)


def batch_of(states, advantage=ADVANTAGE, micro_batch=None):
    return take_batch(states, advantage, np.ones(1), deal_states(3, 4, 1, 1, micro_batch))


def velocities(params, states):
    """At every noised sample, `[3, 4, C, N, D]`, one by one."""
    found = np.zeros(states.latents.shape, np.float32)
    for place in np.ndindex(states.time.shape):
        text = {"text": TEXT["text"][place[0]][None]}
        found[place] = toy.velocity(params, states.latents[place][None], states.time[place][None], text)[0]
    return jnp.array(found)


def first(batch):
    return jax.tree.map(lambda x: x[0], batch)


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_the_odes_and_states_are_these_noised(name):
    plan = toy.small(name).make_plan()
    rollout = roll(plan)
    (states,) = rollout.transitions
    chex.assert_trees_all_equal(states.data.reshape(-1, *toy.SHAPE), rollout.latents)
    t = states.time[..., None, None]
    chex.assert_trees_all_close(states.latents, (1 - t) * states.data[:, :, None] + t * states.noise, atol=1e-6)
    assert set(np.asarray(states.time).ravel()) <= set(np.float32(plan.times[:-1]))
    shared = all(np.array_equal(x[:, :1] + 0 * x, x) for x in (states.time, states.noise))
    assert shared == (name == "v_grpo")
    assert len(np.unique(states.noise)) == states.noise.size / (4 if shared else 1)


@pytest.mark.parametrize("name", NAMES)
def test_each_pair_of_a_sample_is_one_forward_and_backward_pass(name):
    plan, config, counting = toy.small(name).make_plan(), LearnerConfig(), toy.Counting()
    batches = (first(batch_of(*roll(plan).transitions)),)
    jax.jit(lambda: policy_gradient(counting, plan.objective(config), PARAMS, TEXT, batches))()
    jax.effects_barrier()
    assert counting.samples == 3 * plan.training_passes


def restated(name, states, advantage, config, params, old):
    """The mean loss over samples, its velocities taken one by one."""
    new_velocity, old_velocity = velocities(params, states), velocities(old, states)
    data = jnp.broadcast_to(states.data[:, :, None], states.latents.shape)
    clipped = advantage[:, 0].clip(-config.advantage_clip, config.advantage_clip)
    losses = []
    for p, g in np.ndindex(3, 4):
        A, t, at = float(clipped[p, g]), states.time[p, g], (states.latents[p, g], data[p, g], states.time[p, g])
        v, v_old = new_velocity[p, g], old_velocity[p, g]
        if name == "diffusion_nft":
            losses.append(nft_loss(v, v_old, *at, jnp.full(t.shape, A), strength=1.0).mean())
            continue
        if name == "awm":
            density = lambda v, p=p, g=g: awm_log_density(v, data[p, g], states.noise[p, g], states.time[p, g])
            ratios, A = np.exp(density(v) - density(v_old)), A / config.advantage_clip
        else:
            ratios = np.exp([vgrpo_error(v_old, *at).mean() - vgrpo_error(v, *at).mean()])
        eps = config.clip_range
        losses.append(np.mean([max(-A * r, -A * min(max(r, 1 - eps), 1 + eps)) for r in ratios]))
    return float(np.mean(losses))


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_mean_of_the_samples(name, micro_batch):
    plan, config = toy.small(name).make_plan(), LearnerConfig(clip_range=0.05)
    (states,) = roll(plan).transitions
    batch, objective = first(batch_of(states, micro_batch=micro_batch)), plan.objective(config)
    batch = batch._replace(old=score_batch(toy.velocity, objective, PARAMS, TEXT, batch))
    _, stats = policy_gradient(toy.velocity, objective, OTHER, TEXT, (batch,))
    expected = restated(name, states, ADVANTAGE, config, OTHER, PARAMS)
    np.testing.assert_allclose(stats.loss.loss, expected, rtol=2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_on_the_policy_no_second_pass_is_needed(name):
    """The gradient without old velocities is that with those of the same parameters."""
    plan, config = toy.small(name).make_plan(), LearnerConfig()
    batch, objective = first(batch_of(*roll(plan).transitions)), plan.objective(config)
    known = batch._replace(old=score_batch(toy.velocity, objective, PARAMS, TEXT, batch))
    alone, scored = (policy_gradient(toy.velocity, objective, PARAMS, TEXT, (b,)) for b in (batch, known))
    chex.assert_trees_all_close(alone[0], scored[0], rtol=1e-3, atol=1e-5)
    assert alone[1].loss.ratio_deviation < 1e-5
    assert optax.tree.norm(alone[0]) > 1e-3


def test_vgrpos_soft_clip():
    config = LearnerConfig(advantage_clip=5.0)
    batch = first(batch_of(*roll(toy.small("v_grpo").make_plan()).transitions))
    soft = dataclasses.replace(toy.small("v_grpo"), soft_clip=3.0).make_plan().objective(config)
    found = soft.advantage(batch)
    np.testing.assert_allclose(found, 3 * np.tanh(np.clip(batch.advantage, -5, 5) / 3), rtol=1e-5)


def learn(plan, config, iterations=3, learning_rate=0.1):
    """Iterations with plain gradient steps; the states before and after each."""
    optimizer, objective = optax.sgd(learning_rate), plan.objective(config)
    states, text = [init_state(PARAMS, optimizer, config)], TEXT
    for iteration in range(iterations):
        state = states[-1]
        sampler = state.trailing if config.samples == "trailing" else state.params
        blocks = plan.roll_out(
            toy.velocity, sampler, plan.deal(3, 1, None), plan.schedule(), text, KEYS, toy.SHAPE
        ).transitions
        advantage = jax.random.normal(jax.random.key(iteration), (3, len(plan.step_weights("none")), plan.group_size))
        batches = tuple(
            take_batch(block, advantage, plan.step_weights("none"), deal_states(3, size.states, 1))
            for size, block in zip(plan.blocks, blocks, strict=True)
        )
        state, stats = update_policy(
            lambda params, batch: score_batch(toy.velocity, objective, params, text, batch),
            lambda params, batches: policy_gradient(toy.velocity, objective, params, text, batches),
            _Plain(optimizer),
            config,
            state,
            batches,
            iteration,
        )
        states.append(state)
    return states, stats


class _Plain:
    """An optimizer whose update takes the norm that it does not need."""

    def __init__(self, optimizer):
        self.init, self._update = optimizer.init, optimizer.update

    def update(self, grads, state, params=None, **_):
        return self._update(grads, state, params)


def test_the_trailing_copy_is_an_average_whose_decay_rises():
    config = LearnerConfig(samples="trailing", trailing_decay=0.5, trailing_ramp=0.2)
    states, _ = learn(toy.small("diffusion_nft").make_plan(), config, iterations=4)
    expected = PARAMS
    for decay, state in zip([0.2, 0.4, 0.5, 0.5], states[1:], strict=True):
        expected = jax.tree.map(lambda t, p, d=decay: d * t + (1 - d) * p, expected, state.params)
        chex.assert_trees_all_close(state.trailing, expected, atol=1e-6)
        assert optax.tree.norm(optax.tree.sub(state.params, state.trailing)) > 1e-5


def test_the_reference_stays_and_holds():
    plan = toy.small("v_grpo").make_plan()
    free, _ = learn(plan, LearnerConfig(), iterations=6)
    held, stats = learn(plan, LearnerConfig(reference_weight=30.0, reference_in="velocity"), iterations=6)
    chex.assert_trees_all_equal(held[-1].reference, PARAMS)
    moved = [optax.tree.norm(optax.tree.sub(states[-1].params, PARAMS)) for states in (free, held)]
    assert moved[1] < 0.8 * moved[0]
    assert stats.loss.penalty[0] > 0
    assert free[-1].reference is None


@pytest.mark.parametrize("where", ["mean", "velocity"])
def test_the_distance_of_random_steps_from_the_reference(where):
    plan = EGrpo(num_steps=4, group_size=4).make_plan()
    config = LearnerConfig(reference_weight=2.0, reference_in=where, clip_range=0.5)
    deal, text = plan.deal(3, 1, None), TEXT
    (steps,) = plan.roll_out(toy.velocity, PARAMS, deal, (), text, KEYS, toy.SHAPE).transitions
    advantage = jnp.zeros((3, 2, 4))
    batch = first(take_batch(steps, advantage, np.ones(2), deal_states(3, 2, 1)))
    objective = plan.objective(config)
    batch = batch._replace(reference=score_batch(toy.velocity, objective, OTHER, text, batch))
    _, stats = policy_gradient(toy.velocity, objective, PARAMS, text, (batch,))
    distances = []
    for index in range(2):
        own = jax.tree.map(lambda x, index=index: x[:, index], steps)
        ours, other = (score_samples(toy.velocity, plan.process, params, own, text) for params in (PARAMS, OTHER))
        if where == "mean":
            apart = ((ours.kernel.mean - other.kernel.mean) / ours.kernel.std) ** 2 / 2
            chex.assert_trees_all_close(
                kl_divergence(ours.kernel, other.kernel)[:, 0], apart.mean((1, 2, 3)), rtol=1e-5
            )
        else:
            apart = (ours.velocity - other.velocity)[:, None] ** 2
        distances.append(apart.mean((1, 2, 3)))
    np.testing.assert_allclose(stats.loss.loss, 2.0 * np.mean(distances), rtol=1e-5)
    np.testing.assert_allclose(stats.loss.penalty, stats.loss.loss, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_workers_that_share_a_prompt_sample_what_one_does(name):
    plan = toy.small(name).make_plan()
    keys, text = KEYS[:1], {"text": TEXT["text"][:1]}
    deal, parts = plan.deal(1, 2, None), []
    whole = plan.roll_out(toy.velocity, PARAMS, plan.deal(1, 1, None), plan.schedule(), text, keys, toy.SHAPE)
    for worker in range(2):
        own = jax.tree.map(
            lambda table, axis, worker=worker: np.split(table, 2, axis)[worker], deal, deal.worker_axes()
        )
        parts.append(plan.roll_out(toy.velocity, PARAMS, own, plan.schedule(), text, keys, toy.SHAPE))
    rows = jax.tree.map(lambda *rows: jnp.concatenate(rows), *(part.transitions for part in parts))
    chex.assert_trees_all_close(plan.gather(rows, 1, 2), whole.transitions, atol=1e-6)
    chex.assert_trees_all_close(jnp.concatenate([part.latents for part in parts]), whole.latents, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"objective": "kl_mask"}, "config.learner.objective: found 'kl_mask', expected 'clip': samples of this"),
        ({"step_weights": "flat"}, "config.learner.step_weights: found 'flat', expected 'none'"),
        ({"reference_weight": 0.1}, "config.learner.reference_in: found 'mean', expected 'velocity'"),
    ],
)
def test_what_needs_random_steps_is_refused(changes, line):
    with pytest.raises(ConfigError) as error:
        DiffusionNft().make_plan().objective(LearnerConfig(**changes))
    assert str(error.value).startswith(line)


def test_a_sample_has_no_more_pairs_than_there_are_times():
    with pytest.raises(ConfigError, match="pairs: found 11, expected at most 10"):
        DiffusionNft(pairs=11)
    with pytest.raises(ConfigError, match="pairs: found 13, expected at most 12"):
        Awm(pairs=13)
    with pytest.raises(ConfigError, match="trailing_decay: found None, expected a number"):
        LearnerConfig(samples="trailing")
    assert VGrpo(pairs=16).make_plan().training_passes == 12 * 16
