"""Plans: merges, costs and every way a config can be wrong."""

import pytest

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.flow.entropy import exp_entropy
from egrpo_jax.flow.process import FlowSde
from egrpo_jax.rl.plan import PlanConfig, describe, make_plan


def test_the_papers_plan():
    plan = make_plan(PlanConfig())
    assert [branch.merge for branch in plan.branches] == [1, 1, 2, 2, 2, 3, 3, 3]
    assert [branch.step for branch in plan.branches] == list(range(8))
    assert (plan.rollout_passes, plan.training_passes) == (1012, 8)
    assert plan.decodes == 96


@pytest.mark.parametrize(
    ("changes", "rollout", "decodes"),
    [
        ({"entropy_threshold": 0.0}, 16 + 1104, 96),
        ({"entropy_threshold": 0.0, "tail_strides": (1, 2)}, 1696, 192),  # what G2RPO needs at {1, 2}
        ({"entropy_threshold": 0.0, "tail_strides": (1, 2, 3)}, 2092, 288),  # and at {1, 2, 3}
        ({"num_steps": 8, "group_size": 8}, 8 + 8 * 21, 32),
    ],
)
def test_costs(changes, rollout, decodes):
    plan = make_plan(PlanConfig(**changes))
    assert (plan.rollout_passes, plan.decodes) == (rollout, decodes)


def test_explicit_merges():
    plan = make_plan(PlanConfig(entropy_threshold=None, active_steps=(2, 5, 14), merges=(4, 1, 2)))
    assert [(branch.step, branch.stop) for branch in plan.branches] == [(2, 6), (5, 6), (14, 16)]
    assert plan.branches[0].exp_entropy == exp_entropy(FlowSde(0.7), plan.times, 2, 4)
    assert plan.branches[0].unmerged_exp_entropy == exp_entropy(FlowSde(0.7), plan.times, 2, 1)
    assert not any(branch.clamped for branch in plan.branches)


def test_description_shows_the_merges_and_reports_clamped_steps():
    late = describe(make_plan(PlanConfig(active_steps=(0, 15))))
    assert late.count("clamped") == 1
    assert "clamped" not in describe(make_plan(PlanConfig()))
    assert "1012 forward passes and 96 images" in describe(make_plan(PlanConfig()))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_steps": 1}, "num_steps"),
        ({"group_size": 1}, "group_size"),
        ({"shift": 0.0}, "shift"),
        ({"noise_level": -0.7}, "noise_level"),
        ({"tail_strides": ()}, "tail_strides"),
        ({"tail_strides": (1, 0)}, r"tail_strides\[1\]"),
        ({"active_steps": (0, 16)}, "active_steps"),
        ({"active_steps": (-1,)}, r"active_steps\[0\]"),
        ({"active_steps": ()}, "active_steps"),
        ({"active_steps": (3, 3)}, "active_steps"),
        ({"merges": (1,) * 8}, "merges"),  # beside the default threshold
        ({"entropy_threshold": None}, "merges"),
        ({"entropy_threshold": -1.0}, "entropy_threshold"),
        ({"entropy_threshold": None, "merges": (1, 1)}, "merges"),
        ({"entropy_threshold": None, "active_steps": (14,), "merges": (3,)}, "merges"),
        ({"entropy_threshold": None, "active_steps": (14,), "merges": (0,)}, r"merges\[0\]"),
    ],
)
def test_wrong_configs_name_the_key(changes, key):
    with pytest.raises(ConfigError, match=rf"^config\.{key}: found .*, expected "):
        PlanConfig(**changes)
