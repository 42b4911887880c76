"""Trees of random steps against plain loops, single anchors, and the cost tables."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.flow.transition import draw, euler_step
from egrpo_jax.rl.algorithms.base import ALGORITHMS, Algorithm
from egrpo_jax.rl.algorithms.branch_grpo import BranchGrpo
from egrpo_jax.rl.algorithms.dance_grpo import DanceGrpo
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.algorithms.flow_grpo import FlowGrpo
from egrpo_jax.rl.algorithms.flow_grpo_fast import FlowGrpoFast
from egrpo_jax.rl.algorithms.mix_grpo import MixGrpo
from egrpo_jax.rl.objective import score_samples
from egrpo_jax.rl.rollout import walk_anchors
from egrpo_jax.rl.transitions import initial_noise, prompt_keys, step_noise
from tests import toy

PARAMS = toy.params()


def run(plan, num_prompts=2, velocity=toy.velocity, workers=1, worker=0, key=0, compiled=None):
    """A worker's part of the rollouts of `plan`."""
    rows = num_prompts * plan.seeds
    keys, text = prompt_keys(jax.random.key(key), 0, rows), toy.conditioning(rows)
    deal = plan.deal(rows, workers, None)
    if workers > 1:
        part = lambda table, axis: np.split(table, workers, axis)[worker]
        deal = jax.tree.map(part, deal, deal.worker_axes())
    if plan.candidates > 1:
        more = prompt_keys(jax.random.key(key), 0, rows * plan.candidates)
        walk = lambda: walk_anchors(velocity, PARAMS, plan, toy.conditioning(len(more)), more, toy.SHAPE)
        anchors = jax.tree.map(lambda x: x[:rows], jax.jit(walk)()[0])
        text = {"text": toy.conditioning(len(more))["text"][:rows]}, anchors
    body = lambda schedule: plan.roll_out(velocity, PARAMS, deal, schedule, text, keys, toy.SHAPE)
    return (compiled or jax.jit(body))(plan.schedule())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_real_calls_are_those_that_the_plan_says(name):
    plan, counting = toy.small(name).make_plan(), toy.Counting()
    rollout = run(plan, velocity=counting)
    jax.effects_barrier()
    assert counting.samples == 2 * plan.rollout_passes
    assert len(rollout.latents) == 2 * plan.seeds * plan.decodes
    states = 0
    for block, transitions in zip(plan.blocks, rollout.transitions, strict=True):
        assert transitions.sample.shape == (2 * plan.seeds, *block)
        states += 2 * plan.seeds * block.states * getattr(plan, "pairs", 1)
    assert states == 2 * plan.training_passes


@pytest.mark.parametrize(
    ("name", "changes", "forward", "training", "images"),
    [  # the columns "needed" of the published methods' costs
        ("egrpo", {}, 1012, 8, 96),
        ("g2rpo", {}, 1696, 8, 192),
        ("g2rpo", {"granularities": (1, 2, 3)}, 2092, 8, 288),
        ("flow_grpo", {}, 144, 120, 24),
        ("flow_grpo", {"num_steps": 10}, 240, 216, 24),
        ("flow_grpo_fast", {}, 144, 72, 24),
        ("dance_grpo", {}, 181, 108 - 11, 12),
        ("mix_grpo", {}, 289, 37, 12),
        ("mix_grpo", {"first": 11}, 168, 37, 12),
        ("mix_grpo", {"tail_share": 0.4}, 1 + 3 * 12 + 8 * 12, 37, 12),
        ("branch_grpo", {}, 203, 203, 16),
        ("branch_grpo", {"pruned": 5}, 203, 203 - 80, 16),
        ("branch_grpo", {"leaves": "extremes"}, 203, 203 - 80, 16),
        ("branch_grpo", {"leaves": "best_half", "pruned": 5}, 203, 203 - 80 - 40, 16),
        ("tempflow_grpo", {}, 1120, 36, 216),
        ("ada_grpo", {}, 736, 4, 58),
        ("diffusion_nft", {}, 240, 216, 24),
        ("awm", {}, 336, 144, 24),
        ("v_grpo", {}, 192, 48, 12),
    ],
)
def test_passes_are_those_needed(name, changes, forward, training, images):
    plan = Algorithm.variant({"algorithm": name})(**changes).make_plan()
    assert (plan.rollout_passes, plan.training_passes, plan.images) == (forward, training, images)


def test_mixgrpo_costs_what_it_does_while_its_window_moves():
    costs = [MixGrpo().make_plan(iteration).rollout_passes for iteration in range(300)]
    assert (costs[0], costs[-1]) == (289, 168)
    np.testing.assert_allclose(np.mean(costs), 228.5)


@pytest.mark.parametrize("name", ["flow_grpo_fast", "mix_grpo", "branch_grpo"])
def test_a_schedule_that_moves_compiles_once(name):
    algorithm, plan = toy.small(name), toy.small(name).make_plan()
    keys, text, deal = prompt_keys(jax.random.key(0), 0, 2), toy.conditioning(2), plan.deal(2, 1, None)
    traces = []

    @jax.jit
    def body(schedule):
        traces.append(1)
        return plan.roll_out(toy.velocity, PARAMS, deal, schedule, text, keys, toy.SHAPE)

    times = set()
    for iteration in range(6):
        now = algorithm.make_plan(iteration, seed=3)
        moved, own = body(now.schedule()), run(now)
        chex.assert_trees_all_close(moved, own, atol=1e-6)
        times |= {float(time) for time in moved.transitions[-1].time.ravel()}
    assert len(traces) == 1
    assert len(times) > len(now.branches) or name == "branch_grpo"


def test_windows_over_iterations():
    start = lambda config, iteration, seed=0: config.make_plan(iteration, seed).branches[0].step
    mix = MixGrpo()
    assert [start(mix, i) for i in (0, 24, 25, 49, 50, 299, 10_000)] == [0, 0, 1, 1, 2, 11, 20]
    assert {start(MixGrpo(moves="frozen", first=2), i) for i in (0, 100)} == {2}
    drawn = [start(MixGrpo(moves="random"), i) for i in range(300)]
    assert set(drawn) == set(range(21))
    assert drawn == [start(MixGrpo(moves="random"), i) for i in range(300)]
    assert drawn != [start(MixGrpo(moves="random"), i, seed=1) for i in range(300)]
    assert {start(FlowGrpoFast(), i) for i in range(50)} == {0}
    assert {start(FlowGrpoFast(num_steps=10, window=2), i) for i in range(50)} == {0, 1, 2, 3}


def test_what_branchgrpo_prunes():
    kept = lambda iteration: BranchGrpo(pruned=5).make_plan(iteration).kept_steps
    assert kept(0) == (0, 1, 2, 3, 4)  # of the steps 10 to 19, 15 to 19 do not train
    assert kept(29) == kept(0)
    assert kept(30) == (0, 1, 2, 3, 9)
    assert kept(150) == kept(10_000) == (5, 6, 7, 8, 9)


@pytest.mark.parametrize(
    ("leaves", "kept"),
    [("best_half", [[1, 2], [0, 3]]), ("extremes", [[0, 2], [1, 3]])],  # siblings are 0 1 and 2 3
)
def test_whose_steps_branchgrpo_prunes(leaves, kept):
    plan = BranchGrpo(num_steps=6, splits=(0, 2), group_size=4, leaves=leaves).make_plan()
    pairs, singles = run(plan).transitions
    advantage = jnp.zeros((2, 6, 4)).at[:, -1].set(jnp.array([[-2.0, 1.0, 3.0, 0.5], [2.0, -3.0, -1.0, 4.0]]))
    same, pruned = plan.prune((pairs, singles), advantage)
    chex.assert_trees_all_equal(same, pairs)
    assert (
        [block.time.shape[1] for block in (same, pruned)] == [block.states for block in plan.blocks] == [3, 2 + 3 * 2]
    )
    for prompt in range(2):
        np.testing.assert_array_equal(pruned.sample[prompt, :2, 0], [0, 2])  # the step before the last split
        np.testing.assert_array_equal(pruned.sample[prompt, 2:, 0], kept[prompt] * 3)
        np.testing.assert_array_equal(pruned.step[prompt, 2:], [3, 3, 4, 4, 5, 5])
        for m in range(2, 8):
            step, sample = int(pruned.step[prompt, m]), int(pruned.sample[prompt, m, 0])
            place = np.flatnonzero((singles.step[prompt] == step) & (singles.sample[prompt, :, 0] == sample))[0]
            np.testing.assert_array_equal(pruned.latents[prompt, m], singles.latents[prompt, place])
            np.testing.assert_array_equal(pruned.next_latents[prompt, m], singles.next_latents[prompt, place])


def test_the_shape_of_branchgrpos_tree():
    plan = BranchGrpo().make_plan()
    assert plan.widths == (1, 2, 2, 2, 4, 4, 4, 8, 8, 8, *[16] * 11)
    assert [tuple(block) for block in plan.blocks] == [(15, 2), (188, 1)]
    rollout = run(BranchGrpo(num_steps=5, splits=(0, 2), group_size=4).make_plan(), num_prompts=1)
    pairs, singles = rollout.transitions
    np.testing.assert_array_equal(pairs.step[0], [0, 2, 2])
    np.testing.assert_array_equal(pairs.sample[0], [[0, 2], [0, 1], [2, 3]])
    np.testing.assert_array_equal(singles.step[0], [1, 1, 3, 3, 3, 3, 4, 4, 4, 4])
    np.testing.assert_array_equal(singles.sample[0, :, 0], [0, 2, 0, 1, 2, 3, 0, 1, 2, 3])
    # Every state is the end of the step before it, on the way of the same sample.
    np.testing.assert_array_equal(singles.latents[0, :2], pairs.next_latents[0, 0])
    np.testing.assert_array_equal(pairs.latents[0, 1:], singles.next_latents[0, :2, 0])
    np.testing.assert_array_equal(singles.latents[0, 2:6], pairs.next_latents[0, 1:].reshape(4, *toy.SHAPE))


def by_hand(plan, keys, text, roots):
    """The samples of one rollout, each walked by itself; every random step of `plan` a chain's."""
    times, ends, key = np.array(plan.times, np.float32), [], keys[0]
    one = lambda x, t: toy.velocity(PARAMS, x[None], jnp.full(1, t), text)[0]
    first, last = plan.branches[0].step, plan.branches[-1].stop
    for sample in range(plan.group_size):
        x = roots[min(sample, len(roots) - 1)]
        for i in range(first):
            x = euler_step(x, one(x, times[i]), times[i], times[i + 1])
        for branch in plan.branches:
            t, end = times[branch.step], times[branch.stop]
            kernel = plan.process.kernel(x, one(x, t), t, end, np.float32(branch.noise))
            noise = step_noise(key[None], jnp.array([branch.step]), jnp.array([sample]), toy.SHAPE)[0, 0, 0]
            x = draw(kernel, noise)
        for i in range(last, plan.num_steps):
            x = euler_step(x, one(x, times[i]), times[i], times[i + 1])
        ends.append(x)
    return jnp.stack(ends)


@pytest.mark.parametrize(
    "config",
    [MixGrpo(num_steps=6, group_size=3, window=2, first=2, moves="frozen"), DanceGrpo(num_steps=5, group_size=3)],
    ids=["mix", "dance"],
)
def test_samples_of_one_noise_equal_those_walked_one_by_one(config):
    plan, keys = config.make_plan(), prompt_keys(jax.random.key(0), 0, 1)
    expected = by_hand(plan, keys, toy.conditioning(1), initial_noise(keys, toy.SHAPE))
    chex.assert_trees_all_close(run(plan, num_prompts=1).latents, expected, atol=2e-6)


def test_samples_of_own_noise_equal_those_walked_one_by_one():
    plan, keys = FlowGrpo(num_steps=5, group_size=3).make_plan(), prompt_keys(jax.random.key(0), 0, 1)
    rollout = run(plan, num_prompts=1)
    roots = rollout.transitions[0].latents[0, :3]
    assert len(np.unique(np.asarray(roots))) == roots.size
    np.testing.assert_allclose(np.std(roots), 1, atol=0.3)
    chex.assert_trees_all_close(rollout.latents, by_hand(plan, keys, toy.conditioning(1), roots), atol=2e-6)


def test_a_window_of_one_step_is_egrpo_with_one_active_step():
    grid = {"num_steps": 6, "group_size": 4, "process": "flow_sde", "noise_level": 0.7}
    tree = FlowGrpoFast(**grid, window=1, window_end=1, same_noise=True).make_plan()
    anchor = EGrpo(**grid, active_steps=(0,), entropy_threshold=0.0).make_plan()
    chex.assert_trees_all_close(run(tree).transitions, run(anchor).transitions, atol=1e-6)
    ends, places = run(anchor).latents, anchor.deal(2, 1, None).sample
    chex.assert_trees_all_close(run(tree).latents[places], ends, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in ("diffusion_nft", "awm", "v_grpo")])
def test_the_ratio_is_1_before_the_first_update(name):
    plan = toy.small(name).make_plan(1)
    rollout, text = run(plan, num_prompts=1), toy.conditioning(max(plan.seeds, plan.candidates))
    text = jax.tree.map(lambda x: x[: plan.seeds], text)
    for block in rollout.transitions:
        for state in range(block.time.shape[1]):
            own = jax.tree.map(lambda x, state=state: x[:, state], block)
            scored = score_samples(toy.velocity, plan.process, PARAMS, own, text)
            chex.assert_trees_all_close(scored.log_prob, own.log_prob, atol=1e-6)


@pytest.mark.parametrize("name", ["flow_grpo", "flow_grpo_fast", "dance_grpo", "mix_grpo", "branch_grpo"])
def test_with_next_to_no_noise_all_samples_of_a_root_end_where_the_ode_ends(name):
    grid = toy.SMALL[name] | {"process": "dance_sde", "noise_level": 1e-4}
    plan = Algorithm.variant({"algorithm": name})(**grid).make_plan()
    plan = dataclasses.replace(plan, tail_solvers=EGrpo().make_plan().tail_solvers)
    keys, text = prompt_keys(jax.random.key(0), 0, 2), toy.conditioning(2)
    if plan.roots == 1:
        starts = jnp.repeat(initial_noise(keys, toy.SHAPE)[:, None], plan.group_size, 1)
    elif plan.branches[0].step == 0:
        starts = run(plan).transitions[0].latents[:, : plan.group_size]
    else:
        return
    text = {"text": jnp.repeat(text["text"], plan.group_size, 0)}
    x, times = starts.reshape(-1, *toy.SHAPE), np.array(plan.times, np.float32)
    for t, end in itertools.pairwise(times):
        x = euler_step(x, toy.velocity(PARAMS, x, jnp.full(len(x), t), text), t, end)
    chex.assert_trees_all_close(run(plan).latents, x, atol=1e-3)


@pytest.mark.parametrize("name", ["flow_grpo", "flow_grpo_fast", "dance_grpo", "mix_grpo", "branch_grpo"])
@pytest.mark.parametrize("workers", [2, 4])
def test_workers_that_share_a_prompt_walk_what_one_does(name, workers):
    plan = toy.small(name).make_plan()
    whole = run(plan, num_prompts=1)
    parts = [run(plan, num_prompts=1, workers=workers, worker=worker) for worker in range(workers)]
    chex.assert_trees_all_close(jnp.concatenate([part.latents for part in parts]), whole.latents, atol=1e-6)
    gathered = plan.gather(
        jax.tree.map(lambda *rows: jnp.concatenate(rows), *(part.transitions for part in parts)), 1, workers
    )
    chex.assert_trees_all_close(gathered, whole.transitions, atol=1e-6)


def test_a_tree_that_devices_cannot_share_is_refused():
    plan = MixGrpo(num_steps=6, group_size=6, window=2).make_plan()
    plan.deal(3, 3, None)
    plan.deal(1, 3, None)
    with pytest.raises(
        ConfigError, match=r"^config\.prompts_per_iteration: found 1, expected a multiple of the 4 devices"
    ):
        plan.deal(1, 4, None)


def test_dancegrpo_trains_so_many_steps_of_each_sample():
    plan = DanceGrpo(num_steps=7, group_size=4).make_plan()
    shared, chains = run(plan, num_prompts=3).transitions
    assert shared.log_prob.shape == (3, 1, 4)
    assert chains.log_prob.shape == (3, 4 * 2, 1)  # 3 of 6 steps, of which the first is shared
    chosen = set()
    for prompt in range(3):
        for sample in range(4):
            steps = sorted(np.asarray(chains.step[prompt])[np.asarray(chains.sample[prompt, :, 0]) == sample])
            assert len(set(steps)) == 2
            assert set(steps) <= {1, 2, 3, 4, 5}
            chosen.add(tuple(steps))
    assert len(chosen) > 3  # each sample draws its own


def centred(values, came):
    del came
    total = sum(values.values())
    return (total - total.mean(-1, keepdims=True)).sum(2)


def test_credit_of_a_sample_is_the_same_at_all_its_steps():
    plan = MixGrpo(num_steps=6, group_size=4, window=3).make_plan()
    rewards = jnp.array([[1.0, 2.0, 3.0, 6.0], [0.0, 0.0, 0.0, 4.0]])[:, None, None]
    found = plan.credit(centred, {"a": rewards}, jnp.ones_like(rewards, bool))
    expected = np.array([[-2.0, -1.0, 0.0, 3.0], [-1.0, -1.0, -1.0, 3.0]])
    np.testing.assert_allclose(found, np.repeat(expected[:, None], 3, 1), atol=1e-6)


def test_credit_of_a_tree_is_by_depth():
    plan = BranchGrpo(num_steps=5, splits=(0, 2), group_size=4).make_plan()
    rewards = jnp.array([1.0, 3.0, 6.0, 10.0])[None, None, None]
    found = plan.credit(centred, {"a": rewards}, jnp.ones_like(rewards, bool))[0]
    upper, leaves = [-3.0, -3.0, 3.0, 3.0], [-4.0, -2.0, 1.0, 5.0]  # means 2 and 8 around 5; the leaves around 5
    np.testing.assert_allclose(found, [upper, upper, leaves, leaves, leaves], atol=1e-6)


@pytest.mark.parametrize(
    ("compared_with", "expected"), [("seed", [-1.0, 1.0, -2.0, 2.0]), ("prompt", [-3.5, -1.5, 0.5, 4.5])]
)
def test_groups_of_seeds(compared_with, expected):
    variant = Algorithm.variant({"algorithm": "tempflow_grpo"})
    plan = variant(num_steps=3, seeds=2, group_size=2, compared_with=compared_with).make_plan()
    one = np.array([[1.0, 3.0], [5.0, 9.0]])  # of two seeds, at the first of two steps
    rewards = jnp.array(np.stack([one, one * 0], 1)[:, :, None])
    found = plan.credit(centred, {"a": rewards}, jnp.ones_like(rewards, bool))
    np.testing.assert_allclose(found[:, 0].ravel(), expected)
    np.testing.assert_allclose(found[:, 1], 0)


def test_all_seeds_are_one_prompts():
    plan = Algorithm.variant({"algorithm": "tempflow_grpo"})(num_steps=3, seeds=2, group_size=2).make_plan()
    shapes, rewards = [], jnp.ones((6, 2, 1, 2))

    def normalise(values, came):
        shapes.append((values["a"].shape, came.shape))
        return values["a"].sum(2)

    assert plan.credit(normalise, {"a": rewards}, rewards > 0).shape == (6, 2, 2)
    assert shapes == [((3, 4, 1, 2), (3, 4, 1, 2))]
