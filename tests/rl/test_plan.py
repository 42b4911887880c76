"""Plans: merges, costs and every way a config can be wrong."""

import pytest

from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.flow.entropy import exp_entropy
from egrpo_jax.flow.process import Cps, DanceSde, ExactSde, FlowSde
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.plan import describe


def test_the_papers_plan():
    plan = EGrpo().make_plan()
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
        ({"tail_strides": (), "tail_steps": (4,)}, 16 + 12 * 8 * 4, 96),
        ({"tail_steps": (2,)}, 1012 + 12 * 8 * 2, 192),
    ],
)
def test_costs(changes, rollout, decodes):
    plan = EGrpo(**changes).make_plan()
    assert (plan.rollout_passes, plan.decodes) == (rollout, decodes)


def test_explicit_merges():
    plan = EGrpo(entropy_threshold=None, active_steps=(2, 5, 14), merges=(4, 1, 2)).make_plan()
    assert [(branch.step, branch.stop) for branch in plan.branches] == [(2, 6), (5, 6), (14, 16)]
    assert plan.branches[0].exp_entropy == exp_entropy(FlowSde(0.7), plan.times, 2, 4)
    assert plan.branches[0].unmerged_exp_entropy == exp_entropy(FlowSde(0.7), plan.times, 2, 1)
    assert not any(branch.clamped for branch in plan.branches)


def test_a_threshold_that_is_met_by_noise_alone():
    plan = EGrpo(process="exact_sde", entropy_by="noise").make_plan()
    assert [branch.merge for branch in plan.branches] == [1] * 8
    assert [branch.exp_entropy for branch in plan.branches] == pytest.approx([2.2] * 8)
    assert [branch.noise for branch in plan.branches] == pytest.approx([2.2 / 4.132731] * 8, rel=1e-6)
    assert plan.rollout_passes == 16 + 1104


def test_eulers_kernel_meets_it_by_noise_too():
    plan = EGrpo(entropy_by="noise").make_plan()
    assert [branch.exp_entropy for branch in plan.branches] == pytest.approx([2.2] * 8)
    spans = [plan.times[step] - plan.times[step + 1] for step in range(8)]
    assert [branch.noise**2 * span for branch, span in zip(plan.branches, spans, strict=True)] == pytest.approx(
        [(2.2 / 4.132731) ** 2] * 8, rel=1e-6
    )


def test_standard_deviations_of_ones_own():
    changes = {"process": "exact_sde", "entropy_threshold": None, "num_steps": 8, "active_steps": (1, 3)}
    plan = EGrpo(**changes, stds=(0.4, 0.2)).make_plan()
    assert [(branch.merge, branch.noise) for branch in plan.branches] == [(1, 0.4), (1, 0.2)]
    assert [branch.noise for branch in EGrpo(**changes, stds=(0.3,)).make_plan().branches] == [0.3, 0.3]


@pytest.mark.parametrize(("name", "kind"), [("dance_sde", DanceSde), ("cps", Cps), ("exact_sde", ExactSde)])
def test_merges_by_the_entropy_of_another_process(name, kind):
    plan = EGrpo(process=name, noise_level=0.6, entropy_threshold=1.2).make_plan()
    assert plan.process == kind(0.6)
    for branch in plan.branches:
        assert branch.exp_entropy == exp_entropy(kind(0.6), plan.times, branch.step, branch.merge)
        assert branch.clamped or branch.exp_entropy >= 1.2


class Twice(FlowSde):
    """A process of a user's own."""

    def noise(self, times, step, span):
        return 2 * super().noise(times, step, span)


def test_a_process_of_ones_own():
    own, usual = (EGrpo(process=name, entropy_threshold=0.0) for name in ("tests.rl.test_plan:Twice", "flow_sde"))
    for branch, expected in zip(own.make_plan().branches, usual.make_plan().branches, strict=True):
        assert branch.noise == 2 * expected.noise
    with pytest.raises(UserError, match=r"config\.plan\.process"):
        EGrpo(process="tests.rl.test_plan:Nothing").make_plan()


def refuses(noise_level):
    raise ValueError(f"no such noise: {noise_level}")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("refuses", "'tests.rl.test_plan:refuses' makes no process of a noise level: no such noise: 0.7"),
        ("pytest", "makes no process of a noise level"),
        ("str", "lacks the methods noise, std, kernel, jacobian"),
    ],
)
def test_what_makes_no_process_is_one_line(name, line):
    module = "builtins" if name == "str" else "tests.rl.test_plan"
    with pytest.raises(UserError, match=line):
        EGrpo(process=f"{module}:{name}").make_plan()


@pytest.mark.parametrize("process", ["cps", "exact_sde"])
def test_a_random_step_without_noise_is_refused(process):
    config = EGrpo(process=process, entropy_threshold=None, active_steps=(14,), merges=(2,))
    with pytest.raises(ConfigError, match=r"^config\.plan\.active_steps: found 14, expected steps with noise"):
        config.make_plan()


def test_description_shows_the_merges_and_reports_clamped_steps():
    late = describe(EGrpo(active_steps=(0, 15)).make_plan())
    assert late.count("clamped") == 1
    assert "clamped" not in describe(EGrpo().make_plan())
    assert "1012 forward passes and 96 images" in describe(EGrpo().make_plan())


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
        ({"process": "euler"}, "process"),
        ({"process": "cps", "noise_level": 1.5}, "noise_level"),
        ({"process": "cps", "entropy_by": "noise"}, "process"),
        ({"process": "dance_sde", "entropy_threshold": None, "stds": (0.4,)}, "process"),
        ({"process": "exact_sde", "stds": (0.4,)}, "stds"),  # beside the default threshold
        ({"process": "exact_sde", "entropy_threshold": None, "merges": (1,) * 8, "stds": (0.4,)}, "stds"),
        ({"process": "exact_sde", "entropy_threshold": None, "stds": (0.4, 0.3)}, "stds"),
        ({"process": "exact_sde", "entropy_threshold": None, "stds": (0.0,)}, r"stds\[0\]"),
        ({"process": "exact_sde", "entropy_threshold": 0.0, "entropy_by": "noise"}, "entropy_threshold"),
        ({"process": "exact_sde", "entropy_threshold": None, "merges": (1,) * 8, "entropy_by": "noise"}, "entropy_thr"),
        ({"tail_steps": (0,)}, r"tail_steps\[0\]"),
    ],
)
def test_wrong_configs_name_the_key(changes, key):
    with pytest.raises(ConfigError, match=rf"^config\.{key}.*: found .*, expected "):
        EGrpo(**changes)
