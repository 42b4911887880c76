"""Updates of parts of a rollout: every sample is in one, and together they are the joint update."""

import jax
import numpy as np
import optax
import pytest

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.rl.deal import deal_states
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.plan import Block
from egrpo_jax.rl.transitions import prompt_keys, split_samples
from egrpo_jax.rl.update import policy_gradient, take_batch
from tests import toy

PARAMS, TEXT = toy.params(), toy.conditioning(2)
CASES = [("egrpo", 2), ("egrpo", 3), ("flow_grpo", 2), ("dance_grpo", 4), ("mix_grpo", 4), ("branch_grpo", 4)]


def rolled_out(plan):
    deal, keys = plan.deal(2, 1, None), prompt_keys(jax.random.key(0), 0, 2)
    return plan.roll_out(toy.velocity, PARAMS, deal, plan.schedule(), TEXT, keys, toy.SHAPE).transitions


def batches(plan, transitions, advantage, parts):
    """Of each block `[U, M, B]`."""
    for size, share, block in zip(plan.blocks, plan.shares, transitions, strict=True):
        split = split_samples(block, parts) if size.divides(parts) else block
        states = deal_states(2, split.time.shape[1], 1, parts, 2, share)
        yield take_batch(split, advantage, plan.step_weights("none"), states)


@pytest.mark.parametrize(("name", "parts"), CASES)
def test_minibatches_make_the_joint_gradient_together(name, parts):
    plan, config = toy.small(name).make_plan(), LearnerConfig()
    transitions = jax.jit(lambda: rolled_out(plan))()
    steps = len(plan.branches)
    advantage = jax.random.normal(jax.random.key(3), (2, steps, plan.group_size))
    gradient = jax.jit(lambda batch: policy_gradient(toy.velocity, plan.objective(config), PARAMS, TEXT, batch)[0])
    joint = gradient(tuple(jax.tree.map(lambda x: x[0], b) for b in batches(plan, transitions, advantage, 1)))
    dealt = tuple(batches(plan, transitions, advantage, parts))
    each = [gradient(jax.tree.map(lambda x, part=part: x[part], dealt)) for part in range(parts)]
    assert all(optax.tree.norm(grads) > 0 for grads in each)
    mean = jax.tree.map(lambda *grads: sum(grads) / parts, *each)
    assert optax.tree.norm(optax.tree.sub(mean, joint)) < 1e-5 * optax.tree.norm(joint)

    seen, passes = [], 0
    for part in range(parts):
        for number, batch in enumerate(dealt):
            states, real = jax.tree.map(lambda x, part=part: x[part], batch), batch.weight[part] > 0
            passes += int(real.sum())
            for place in np.argwhere(real):
                index = tuple(place)
                samples = np.asarray(states.states.next_latents[index]).reshape(len(states.advantage[index]), -1)
                seen += [(number, *map(float, sample[:3])) for sample in samples]
    assert len(seen) == len(set(seen)) == 2 * sum(block.states * block.samples for block in plan.blocks)
    assert passes == 2 * plan.training_passes_in(parts)


def test_who_shares_what():
    assert [Block(8, 12).passes(parts) for parts in (1, 4, 5)] == [8, 32, 8]
    assert LearnerConfig(minibatches=3).is_scored(1)
    assert not LearnerConfig().is_scored(8)


def test_active_steps_are_parts_of_their_own():
    with pytest.raises(ConfigError, match="minibatches"):
        LearnerConfig(updates="per_active_step", minibatches=2)
