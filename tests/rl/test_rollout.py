"""The rollout: against a plain-Python restatement, and its invariants."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.flow.solver import DpmSolver2M, Euler
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.deal import deal_tails
from egrpo_jax.rl.objective import score_samples
from egrpo_jax.rl.rollout import roll_out
from egrpo_jax.rl.transitions import initial_noise, prompt_keys
from tests import toy

PARAMS = toy.params()


def run(plan, num_prompts=3, seed=0, velocity=toy.velocity, first=0, slots=None):
    """The rollout of one worker, its latents `[P, E, R, G, N, D]`."""
    keys = prompt_keys(jax.random.key(seed), first, num_prompts)
    text = toy.conditioning(8)["text"][first : first + num_prompts]
    tails = deal_tails(plan, num_prompts, workers=1, slots=slots)
    rollout = jax.jit(lambda: roll_out(velocity, PARAMS, plan, tails, {"text": text}, keys, toy.SHAPE))()
    shape = (num_prompts, len(plan.branches), len(plan.tail_solvers), plan.group_size, *toy.SHAPE)
    return rollout._replace(latents=rollout.latents.reshape(shape))


def test_shapes():
    plan = EGrpo(num_steps=6, group_size=4, tail_strides=(1, 2)).make_plan()
    rollout = run(plan)
    chex.assert_shape(rollout.latents, (3, 3, 2, 4, *toy.SHAPE))
    chex.assert_shape(rollout.transitions[0].latents, (3, 3, *toy.SHAPE))
    chex.assert_shape(rollout.transitions[0].next_latents, (3, 3, 4, *toy.SHAPE))
    chex.assert_shape(rollout.transitions[0].log_prob, (3, 3, 4))
    chex.assert_tree_all_finite(rollout)


@pytest.mark.parametrize(
    "config",
    [
        EGrpo(),
        EGrpo(num_steps=6, group_size=4, tail_strides=(1, 2)),
        EGrpo(entropy_threshold=None, active_steps=(2, 15), merges=(4, 1), group_size=3),
        EGrpo(num_steps=6, group_size=4, tail_steps=(2, 3)),
    ],
)
def test_counted_model_calls_equal_the_plans_cost(config):
    plan, counting = config.make_plan(), toy.Counting()
    rollout = run(plan, num_prompts=2, velocity=counting)
    jax.effects_barrier()
    assert counting.samples == 2 * plan.rollout_passes
    counting.samples = 0
    for step in range(len(plan.branches)):
        transitions = jax.tree.map(lambda x, step=step: x[:, step], rollout.transitions[0])
        score_samples(counting, plan.process, PARAMS, transitions, toy.conditioning(2))
    jax.effects_barrier()
    assert counting.samples == 2 * plan.training_passes


def test_branches_leave_the_anchor_and_tails_start_where_the_merged_step_ends():
    """A merged step from step i continues from i + l; the PyTorch reference continues from i + 1."""
    plan = EGrpo(num_steps=8, group_size=2, entropy_threshold=None, active_steps=(1, 4), merges=(3, 2)).make_plan()
    rollout = run(plan, num_prompts=1)
    text = {"text": toy.conditioning(8)["text"][:1]}

    def euler(x, indices):
        for i, j in itertools.pairwise(indices):
            t = plan.times[i]
            x = x - (t - plan.times[j]) * toy.velocity(PARAMS, x, jnp.full(1, t), text)
        return x

    noise = initial_noise(prompt_keys(jax.random.key(0), 0, 1), toy.SHAPE)
    for index, branch in enumerate(plan.branches):
        latents = rollout.transitions[0].latents[:, index]
        chex.assert_trees_all_close(latents, euler(noise, range(branch.step + 1)), atol=1e-5)
        for sample in range(2):
            start = rollout.transitions[0].next_latents[:, index, sample]
            chex.assert_trees_all_close(
                rollout.latents[:, index, 0, sample], euler(start, range(branch.stop, 9)), atol=1e-5
            )


def test_samples_have_the_kernels_mean_and_std():
    plan = EGrpo(group_size=2000, active_steps=(3,)).make_plan()
    transitions = run(plan, num_prompts=1).transitions[0]
    branch = plan.branches[0]
    t, t_next = plan.times[branch.step], plan.times[branch.stop]
    x = np.asarray(transitions.latents[0, 0], np.float64)
    v = np.asarray(
        toy.velocity(PARAMS, transitions.latents[0], jnp.full(1, t), {"text": toy.conditioning(8)["text"][:1]})[0]
    )
    s = 0.7 * np.sqrt(t / (1 - t))
    mean = x - (t - t_next) * (v + s**2 / (2 * t) * (x + (1 - t) * v))
    std = s * np.sqrt(t - t_next)
    samples = np.asarray(transitions.next_latents[0, 0])
    np.testing.assert_allclose(samples.mean(0), mean, atol=5 * std / 2000**0.5)
    np.testing.assert_allclose(samples.std(0), std, rtol=0.08)


def test_a_sample_depends_on_its_place_alone():
    """Rolling out prompts 1 and 2 alone gives what they get inside a larger batch, and fewer samples change none."""
    plan = EGrpo(num_steps=6, group_size=4).make_plan()
    whole = run(plan, num_prompts=4)
    part = run(EGrpo(num_steps=6, group_size=2).make_plan(), num_prompts=2, first=1)
    chex.assert_trees_all_close(whole.latents[1:3, :, :, :2], part.latents, atol=1e-6)


def test_noise_differs_between_prompts_steps_samples_and_seeds():
    plan = EGrpo(num_steps=6, group_size=3).make_plan()
    first, other = run(plan), run(plan, seed=1)
    samples = np.asarray(first.transitions[0].next_latents).reshape(-1, np.prod(toy.SHAPE))
    distances = np.linalg.norm(samples[:, None] - samples[None], axis=-1)
    assert distances[~np.eye(len(samples), dtype=bool)].min() > 0.5
    assert np.abs(first.latents - other.latents).mean() > 0.05


def test_bit_identical_on_a_rerun():
    plan = EGrpo(num_steps=6, group_size=3).make_plan()
    chex.assert_trees_all_equal(run(plan), run(plan))


def test_tails_of_several_solvers_are_each_what_it_walks_alone():
    plan = EGrpo(num_steps=8, group_size=2, active_steps=(1, 4), tail_strides=(2,), tail_steps=(4,)).make_plan()
    rollout = run(plan, num_prompts=2)
    text = {"text": toy.conditioning(8)["text"][:2]}
    for which, solver in enumerate((Euler(2), DpmSolver2M(4))):
        for index, branch in enumerate(plan.branches):
            for sample in range(2):
                start = rollout.transitions[0].next_latents[:, index, sample]
                # What the solver does with the rest of the grid is its own: see tests/flow/test_solver.py.
                latents, history, nodes = start, solver.history(start), solver.nodes(plan.times, branch.stop)
                for t, t_next, weight in zip(nodes[:-1], nodes[1:], solver.weights(nodes), strict=True):
                    velocity = toy.velocity(PARAMS, latents, jnp.full(2, t), text)
                    latents, history = solver.step(latents, velocity, *map(jnp.float32, (t, t_next, weight)), history)
                chex.assert_trees_all_close(rollout.latents[:, index, which, sample], latents, atol=1e-5)
    different = np.abs(rollout.latents[:, 0, 0] - rollout.latents[:, 0, 1])
    assert different.max() > 1e-3


@pytest.mark.parametrize("slots", [1, 5, 100])
@pytest.mark.parametrize("steps", [(), (2,)])
def test_samples_do_not_depend_on_the_number_of_slots(slots, steps):
    plan = EGrpo(num_steps=6, group_size=3, tail_strides=(1, 2), tail_steps=steps).make_plan()
    chex.assert_trees_all_close(run(plan, slots=slots), run(plan), atol=1e-6)
