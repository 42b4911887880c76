"""Weights of steps, trust regions and epochs, against restatements in NumPy and in plain loops."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.flow.transition import Kernel, kl_divergence, log_prob
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.objective import Scored, policy_loss, score_samples
from egrpo_jax.rl.optimizer import make_optimizer
from tests import toy
from tests.rl.test_update import ADVANTAGE, OPTIM, PARAMS, PLAN, TEXT, TRANSITIONS, moved, run

SETTINGS = [
    {"step_weights": weights, "objective": objective, "kl_limit": 1e-5 if objective == "clip" else 1e-4}
    for weights, objective in itertools.product(("none", "noise", "flat"), ("clip", "kl_mask"))
]


@pytest.mark.parametrize(
    ("changes", "kappa"),
    [
        ({}, [0.0311, 0.0408, 0.0906, 0.1210, 0.1531, 0.2382, 0.2904, 0.3522]),
        ({"entropy_threshold": 0.0}, [0.0311, 0.0408, 0.0626, 0.0834, 0.1054, 0.1297, 0.1575, 0.1902]),
        (
            {"entropy_threshold": 0.0, "process": "exact_sde"},
            [0.0222, 0.0511, 0.0721, 0.0933, 0.1163, 0.1423, 0.1726, 0.2089],
        ),
    ],
)
def test_flat_weights_times_std_are_the_published_one_over_kappa(changes, kappa):
    plan = EGrpo(**changes).make_plan()
    factors = plan.step_weights("flat") * stds(plan)
    np.testing.assert_allclose(factors.mean(), 1.0, rtol=1e-12)
    expected = 1 / np.array(kappa)
    np.testing.assert_allclose(factors, expected / expected.mean(), rtol=2e-3)


def test_the_paper_s_plan_has_the_factors_worked_out_elsewhere():
    plan = EGrpo().make_plan()
    flat = plan.step_weights("flat") * stds(plan)
    np.testing.assert_allclose(flat, [2.77, 2.11, 0.95, 0.71, 0.56, 0.36, 0.30, 0.24], atol=0.0051)
    noise, std = plan.step_weights("noise"), [0.7000, 0.7231, 0.7492, 0.6190, 0.5422, 0.6188, 0.5715, 0.5347]
    np.testing.assert_allclose(noise, std / np.mean(std), rtol=2e-4)
    np.testing.assert_array_equal(plan.step_weights("none"), np.ones(8))


def stds(plan):
    return np.array([plan.process.std(plan.times[b.step], plan.times[b.stop], b.noise) for b in plan.branches])


@pytest.mark.parametrize("process", ["flow_sde", "dance_sde", "cps", "exact_sde"])
def test_flat_weights_give_every_step_the_same_gradient(process):
    """The gradient by a state's velocity is A e / (dimensions), times one number for all steps."""
    plan = EGrpo(num_steps=8, group_size=5, process=process, noise_level=0.7, entropy_threshold=0.0).make_plan()
    noise, latents, velocity = (jax.random.normal(jax.random.key(i), (1, 5, *toy.SHAPE)) for i in range(3))
    latents, velocity, advantage = latents[:, 0], velocity[:, 0], ADVANTAGE[:1, 0]
    found = []
    for branch, weight in zip(plan.branches, plan.step_weights("flat"), strict=True):
        moments = jnp.array([plan.times[branch.step]]), jnp.array([plan.times[branch.stop]]), jnp.array([branch.noise])
        kernel = lambda v, moments=moments: plan.process.kernel(latents, v, *moments)
        sample = kernel(velocity).mean[:, None] + kernel(velocity).std[:, None] * noise

        def loss(v, sample=sample, kernel=kernel, weight=weight):
            shared = jax.tree.map(lambda x: x[:, None], kernel(v))
            scored = Scored(log_prob(shared, sample), shared)
            return policy_loss(LearnerConfig(step_weights="flat"), scored, None, advantage, step_weight=weight)[0]

        found.append(jax.grad(loss)(velocity))
    direction = (advantage[..., None, None] * noise).mean(1) / np.prod(toy.SHAPE)
    scale = 1 / (stds(plan) / jacobians(plan)).mean()
    for grad in found:
        chex.assert_trees_all_close(grad, scale * direction, rtol=2e-3, atol=1e-5 * scale)


def test_flat_weights_of_a_step_that_does_not_move_are_refused():
    plan = EGrpo(num_steps=8, process="exact_sde", entropy_threshold=0.0).make_plan()
    unmoved = type("Unmoved", (), {"jacobian": lambda *_: 0.0, "std": lambda *_: 0.5})()
    expected = (
        r"learner\.step_weights: found 'flat', expected 'none' or 'noise': the mean of the random step 0 does not"
    )
    with pytest.raises(ConfigError, match=expected):
        dataclasses.replace(plan, process=unmoved).objective(LearnerConfig(step_weights="flat"))
    dataclasses.replace(plan, process=unmoved).objective(LearnerConfig())


def jacobians(plan):
    return np.array([plan.process.jacobian(plan.times[b.step], plan.times[b.stop], b.noise) for b in plan.branches])


def test_kl_divergence_is_that_of_the_gaussians():
    mean, other = np.random.default_rng(0).normal(size=(2, 3, *toy.SHAPE))
    std = np.array([0.2, 0.5, 1.0]).reshape(3, 1, 1)
    found = kl_divergence(Kernel(jnp.array(mean), jnp.array(std)), Kernel(jnp.array(other), jnp.array(std)))
    np.testing.assert_allclose(found, ((mean - other) ** 2 / (2 * std**2)).mean((1, 2)), rtol=1e-5)
    # KL(p | q) = E_p[log p - log q]
    samples = mean + std * np.random.default_rng(1).normal(size=(4000, 3, *toy.SHAPE))
    logs = [log_prob(Kernel(jnp.array(m), jnp.array(std)), jnp.array(samples)).mean(0) for m in (mean, other)]
    np.testing.assert_allclose(logs[0] - logs[1], found, rtol=2e-2)


def restated(config, plan, step, samples, mean, old_mean, advantage):
    """The loss of one active step in NumPy, float64: samples [B, G, N, D], means [B, N, D]."""
    branch, std = plan.branches[step], stds(plan)[step]
    log_p = lambda m: (-((samples - m[:, None]) ** 2) / (2 * std**2)).mean((2, 3))
    kl = ((mean - old_mean) ** 2).mean((1, 2))[:, None] / (2 * std**2)
    ratio, advantage = np.exp(log_p(mean) - log_p(old_mean)), np.clip(advantage, -5, 5)
    weight = {"none": 1.0, "noise": std / stds(plan).mean()}.get(config.step_weights)
    if config.step_weights == "flat":
        ratio = np.exp((log_p(mean) - log_p(old_mean) + kl) * std)
        jacobian = plan.process.jacobian(plan.times[branch.step], plan.times[branch.stop], branch.noise)
        weight = 1 / jacobian / (stds(plan) / jacobians(plan)).mean()
    if config.objective == "kl_mask":
        leaves = ((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0))
        return weight * np.where((kl >= config.kl_limit) & leaves, 0, -advantage * ratio).mean()
    clipped = np.clip(ratio, 1 - config.clip_range, 1 + config.clip_range)
    return weight * np.maximum(-advantage * ratio, -advantage * clipped).mean()


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_losses_and_gradients_equal_a_restatement(changes, step):
    config = LearnerConfig(clip_range=2e-3, **changes)
    transitions, advantage = jax.tree.map(lambda x: x[:, step], TRANSITIONS), ADVANTAGE[:, step]
    score = lambda params: score_samples(toy.velocity, PLAN.process, params, transitions, TEXT)
    old, new, weight = score(PARAMS), score(moved()), PLAN.step_weights(config.step_weights)[step]
    double = lambda x: np.asarray(x, np.float64)

    def ours(mean):
        kernel = new.kernel._replace(mean=mean)
        scored = Scored(log_prob(kernel, transitions.next_latents), kernel)
        return policy_loss(config, scored, old, advantage, step_weight=weight)[0]

    def by_hand(mean):
        means = double(mean)[:, 0], double(old.kernel.mean)[:, 0]
        return restated(config, PLAN, step, double(transitions.next_latents), *means, double(advantage))

    value, grad = jax.value_and_grad(ours)(new.kernel.mean)
    np.testing.assert_allclose(value, by_hand(new.kernel.mean), rtol=1e-4, atol=1e-6)
    assert jnp.any(grad != 0)
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=grad.shape)
        towards = lambda h, direction=direction: by_hand(double(new.kernel.mean) + h * direction)
        slope = (towards(1e-7) - towards(-1e-7)) / 2e-7
        np.testing.assert_allclose((double(grad) * direction).sum(), slope, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("updates", ["joint", "per_active_step"])
@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_epochs_equal_plain_loops(updates, changes):
    """The update rule restated: the ratio of every epoch is to the policy that sampled."""
    config = LearnerConfig(updates=updates, epochs=2, micro_batch=3, clip_range=2e-3, **changes)
    groups = [[0], [1], [2], [3]] if updates == "per_active_step" else [[0, 1, 2, 3]]
    optimizer = make_optimizer(OPTIM)
    params, opt_state = PARAMS, optimizer.init(PARAMS)

    def loss(params, group):
        total = 0.0
        for step in group:
            transitions = jax.tree.map(lambda x, step=step: x[:, step], TRANSITIONS)
            old, new = (score_samples(toy.velocity, PLAN.process, p, transitions, TEXT) for p in (PARAMS, params))
            weight = PLAN.step_weights(config.step_weights)[step]
            total += policy_loss(config, new, old, ADVANTAGE[:, step], step_weight=weight)[0] / len(group)
        return total

    for group in groups * 2:
        updates_, opt_state = optimizer.update(jax.grad(loss)(params, group), opt_state, params)
        params = optax.apply_updates(params, updates_)
    state, stats = run(config)
    chex.assert_trees_all_close(state.params, params, atol=5e-6)
    assert stats.grad_norm.shape == (2 * len(groups),)


@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_ratio_is_one_before_the_first_update_and_no_sample_is_dropped(changes):
    for updates, epochs in itertools.product(("joint", "per_active_step"), (1, 2)):
        _, stats = run(LearnerConfig(updates=updates, epochs=epochs, **changes))
        assert stats.loss.ratio_deviation[0] <= 1e-6
        assert stats.loss.clip_high[0] == stats.loss.clip_low[0] == 0
        assert (stats.loss.ratio_deviation[1:] > 1e-5).all()


def test_old_means_are_kept_only_where_the_loss_needs_them():
    for changes in SETTINGS:
        config = LearnerConfig(epochs=2, **changes)
        assert config.needs_kl == (changes["step_weights"] == "flat" or changes["objective"] == "kl_mask")
        kept = dataclasses.replace(config, epochs=1, updates="joint")
        assert (config.is_scored(4), kept.is_scored(4)) == (True, False)


def test_the_second_epoch_is_masked_where_the_policy_has_moved_too_far():
    far, near = (run(LearnerConfig(epochs=2, objective="kl_mask", kl_limit=limit))[1].loss for limit in (1e-12, 1e3))
    assert far.clip_high[1] + far.clip_low[1] > 0.3
    assert near.clip_high[1] == near.clip_low[1] == 0
