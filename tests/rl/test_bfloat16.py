"""The ratio in bfloat16, in which every program rounds differently."""

import functools

import jax
import jax.numpy as jnp
import pytest

from egrpo_jax.models.flux import Flux, FluxConfig
from egrpo_jax.parallel.mesh import EXACT
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.deal import deal_states, deal_tails
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.optimizer import OptimConfig, make_optimizer
from egrpo_jax.rl.rollout import roll_out
from egrpo_jax.rl.transitions import prompt_keys
from egrpo_jax.rl.update import init_state, policy_gradient, score_batch, take_batch, update_policy

CONFIG = FluxConfig(
    in_channels=16, num_double_blocks=1, num_single_blocks=1, num_heads=2, head_dim=16, text_dim=24, pooled_dim=20,
    axes_dims=(4, 6, 6),
)  # fmt: skip
GRID = (4, 4)
PROMPTS = 4
TEXT = jax.random.normal(jax.random.key(1), (PROMPTS, 12, CONFIG.text_dim))
POOLED = jax.random.normal(jax.random.key(2), (PROMPTS, CONFIG.pooled_dim))


def velocity(remat, params, latents, time, conditioning):
    model = Flux(CONFIG, jnp.bfloat16, remat=remat)
    return model.apply({"params": params}, latents, time, *conditioning, jnp.full(time.shape, 3.5), grid=GRID)


@pytest.fixture(scope="module")
def sampled():
    model = Flux(CONFIG)
    latents = jnp.zeros((1, 16, CONFIG.in_channels))
    init = lambda: model.init(jax.random.key(3), latents, jnp.zeros(1), TEXT[:1], POOLED[:1], jnp.zeros(1), grid=GRID)
    shapes, tree = jax.tree.flatten(jax.eval_shape(init)["params"])
    keys = jax.random.split(jax.random.key(4), len(shapes))
    # All random: freshly made, gates and the last layer are zero, and the velocity with them.
    params = tree.unflatten([0.3 * jax.random.normal(key, s.shape) for key, s in zip(keys, shapes, strict=True)])
    plan = EGrpo(num_steps=6, group_size=4).make_plan()
    tails, keys = deal_tails(plan, PROMPTS, 1), prompt_keys(jax.random.key(0), 0, PROMPTS)
    roll = lambda: roll_out(
        functools.partial(velocity, "none"), params, plan, tails, (TEXT, POOLED), keys, (16, CONFIG.in_channels)
    )
    return params, plan, jax.jit(roll)().transitions[0]


BY_STEP = {"updates": "per_active_step"}
SETTINGS = [(remat, batch, BY_STEP) for remat in ("none", "projections", "blocks") for batch in (1, None)]
OBJECTIVES = [{"step_weights": "flat"}, {"step_weights": "noise"}, {"objective": "kl_mask", "kl_limit": 1e-12}]


@pytest.mark.parametrize(
    ("remat", "micro_batch", "changes"),
    [*SETTINGS, ("blocks", 1, {}), *(("blocks", 1, BY_STEP | {"epochs": 2} | each) for each in OBJECTIVES)],
)
def test_ratio_is_one_until_the_parameters_move(sampled, remat, micro_batch, changes):
    params, plan, transitions = sampled
    # So small a learning rate moves no float32: every update is at the parameters that sampled.
    optimizer = make_optimizer(OptimConfig(learning_rate=1e-12))
    config = LearnerConfig(micro_batch=micro_batch, **changes)
    own, conditioning = functools.partial(velocity, remat), (TEXT, POOLED)
    advantage = jax.random.normal(jax.random.key(5), transitions.log_prob.shape)
    states = deal_states(*advantage.shape[:2], 1, config.updates_of_epoch(advantage.shape[1]), micro_batch)

    def update(state):
        score = lambda params, batch: score_batch(own, plan.objective(config), params, conditioning, batch)
        gradient = lambda params, batch: policy_gradient(own, plan.objective(config), params, conditioning, batch)
        batches = (take_batch(transitions, advantage, plan.step_weights(config.step_weights), states),)
        return update_policy(score, gradient, optimizer, config, state, batches)

    _, stats = jax.jit(update, compiler_options=EXACT)(init_state(params, optimizer, config))
    assert stats.loss.ratio_deviation.max() <= 1e-6
    assert stats.loss.clip_high.max() == stats.loss.clip_low.max() == 0
    # The rollout's own log-densities, of another program, would not do.
    assert stats.rollout_deviation[0] > 1e-6
