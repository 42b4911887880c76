"""The configs of the algorithms: that each has one, what it holds, and what its plan costs."""

import dataclasses
import runpy

import pytest

from configs import emoji, flux_egrpo, flux_egrpo_fast
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.pipelines.published import DANCE_GRPO, FLOW_GRPO
from egrpo_jax.rl.algorithms.base import ALGORITHMS
from egrpo_jax.training.config import TrainConfig
from tests import programs

FOLDER = programs.ROOT / "configs" / "algorithms"
FILES = {path.stem: runpy.run_path(str(path)) for path in FOLDER.glob("*.py")}
COSTS = {  # forward passes, training passes and images of a prompt in the first iteration
    "egrpo": (1012, 8, 96),
    "egrpo:repaired": (16 + 12 * sum(range(8, 16)), 8, 96),
    "egrpo:emoji": (8 + 8 * (4 + 3 + 3 + 2), 4, 32),
    "g2rpo": (1696, 8, 192),
    "g2rpo:emoji": (8 + 8 * (4 + 5 + 6 + 7 + 2 + 3 + 3 + 4), 4, 64),
    "ada_grpo": (10 * 16 + 576, 4, 10 + 48),
    "ada_grpo:emoji": (4 * 8 + 8 * (7 + 6 + 5 + 4), 4, 4 + 32),
    "tempflow_grpo": (1120, 36, 216),
    "tempflow_grpo:emoji": (2 * (8 + 4 * 28), 14, 56),
    "flow_grpo": (144, 120, 24),
    "flow_grpo:emoji": (64, 56, 8),
    "flow_grpo_fast": (144, 72, 24),
    "flow_grpo_fast:emoji": (64, 24, 8),
    "dance_grpo": (181, 97, 12),
    "dance_grpo:lora": (1 + 12 * 11, 1 + 12 * 5, 12),
    "dance_grpo:emoji": (57, 1 + 8 * 3, 8),
    "mix_grpo": (289, 37, 12),
    "mix_grpo:flash": (1 + 12 * (3 + 8), 37, 12),
    "mix_grpo:flash_frozen": (1 + 12 * (3 + 4), 37, 12),
    "mix_grpo:emoji": (57, 9, 8),
    "branch_grpo": (203, 203, 16),
    "branch_grpo:pruned": (203, 123, 16),
    "branch_grpo:emoji": (1 + 2 + 4 + 5 * 8, 1 + 2 + 4 + 5 * 8, 8),
    "diffusion_nft": (128, 32, 16),
    "diffusion_nft:emoji": (64, 32, 8),
    "awm": (160, 64, 16),
    "awm:emoji": (64, 32, 8),
    "v_grpo": (192, 48, 12),
    "v_grpo:emoji": (64, 32, 8),
}
ON_FLUX = {  # prompts, learning rate, clip range, average, adapters' rank, pixels
    "egrpo": (8, 2e-6, 1e-4, None, None, 720),
    "egrpo:repaired": (8, 2e-6, 4e-6, None, None, 720),
    "g2rpo": (16, 2e-6, 1e-4, None, None, 720),
    "ada_grpo": (8, 2e-6, 1e-4, None, None, 512),
    "tempflow_grpo": (48, 3e-4, 1e-4, 0.974, 32, 1024),
    "flow_grpo": (48, 3e-4, 1e-4, 0.974, 64, 512),
    "flow_grpo_fast": (48, 3e-4, 1e-5, 0.974, 64, 512),
    "dance_grpo": (16, 1e-5, 1e-4, None, None, 720),
    "dance_grpo:lora": (8, 3e-4, 1e-4, None, 128, 720),
    "mix_grpo": (32, 1e-5, 1e-4, None, None, 720),
    "mix_grpo:flash": (32, 1e-5, 1e-4, None, None, 720),
    "mix_grpo:flash_frozen": (32, 1e-5, 1e-4, None, None, 720),
    "branch_grpo": (16, 1e-5, 1e-3, None, None, 720),
    "branch_grpo:pruned": (16, 1e-5, 1e-3, None, None, 720),
    "diffusion_nft": (48, 3e-4, 1e-4, None, 64, 384),
    "awm": (48, 3e-4, 1.0, None, 64, 512),
    "v_grpo": (32, 1e-5, 1e-2, None, None, 720),
}
PLANS = {  # T, shift, process, its noise level, G
    "egrpo": (16, 3.0, "flow_sde", 0.7, 12),
    "g2rpo": (16, 3.0, "flow_sde", 0.7, 12),
    "ada_grpo": (16, 3.0, "flow_sde", 0.7, 12),
    "tempflow_grpo": (10, 3.158, "flow_sde", 0.7, 6),
    "flow_grpo": (6, 1.878, "flow_sde", 0.9, 24),
    "flow_grpo_fast": (6, 1.878, "cps", 0.8, 24),
    "dance_grpo": (16, 3.0, "dance_sde", 0.3, 12),
    "mix_grpo": (25, 3.0, "flow_sde", 0.7, 12),
    "branch_grpo": (20, 3.0, "dance_sde", 0.3, 16),
    "diffusion_nft": (8, 1.741, None, None, 16),
    "awm": (10, 1.878, None, None, 16),
    "v_grpo": (16, 3.0, None, None, 12),
}


def config(case):
    name, _, variant = case.partition(":")
    return from_config_dict(TrainConfig, FILES[name]["get_config"](variant))


def cases():
    return {f"{name}:{variant}".rstrip(":") for name, file in FILES.items() for variant in file["VARIANTS"]}


def test_every_algorithm_has_a_config_and_every_config_an_algorithm():
    assert FILES.keys() == ALGORITHMS.keys() == PLANS.keys()
    assert all({"", "emoji"} <= file["VARIANTS"].keys() for file in FILES.values())
    assert COSTS.keys() == cases()
    assert ON_FLUX.keys() == {case for case in cases() if not case.endswith(":emoji")}


@pytest.mark.parametrize("case", COSTS)
def test_costs(case):
    found = config(case)
    plan = found.plan.make_plan(0, found.seed)
    assert (plan.rollout_passes, plan.training_passes, plan.images) == COSTS[case]


@pytest.mark.parametrize("case", COSTS)
def test_a_config_is_of_its_algorithm_and_can_be_run(case):
    found = config(case)
    assert found.plan.algorithm == case.split(":")[0]
    assert found.name == case.replace(":", "_")
    assert found.learner.updates == "joint" or found.plan.make_plan().updates_by_step
    assert found.learner.epochs == 1
    assert found.prompts_per_iteration % (found.prompts_per_rollout or 1) == 0


@pytest.mark.parametrize("case", ON_FLUX)
def test_published_numbers(case):
    found = config(case)
    options, learner, optim = found.model.published, found.learner, found.optim
    numbers = found.prompts_per_iteration, optim.learning_rate, learner.clip_range, learner.ema_decay
    assert (*numbers, options.lora and options.lora.rank, options.height) == ON_FLUX[case]
    assert options.height == options.width
    assert (options.guidance, optim.weight_decay, optim.grad_clip) == (None, 1e-4, 1.0)  # published: 3.5
    assert learner.advantage_clip == (1.0 if case == "awm" else 5.0)


@pytest.mark.parametrize("case", PLANS)
def test_published_plans(case):
    plan = config(case).plan
    kernel = getattr(plan, "process", None), getattr(plan, "noise_level", None)
    assert (plan.num_steps, plan.shift, *kernel, plan.group_size) == PLANS[case]


def test_adapters_are_those_that_are_published():
    assert config("flow_grpo").model.published.lora == FLOW_GRPO
    assert config("dance_grpo:lora").model.published.lora == DANCE_GRPO
    tempflow = config("tempflow_grpo").model.published.lora
    assert tempflow.alpha / tempflow.rank == FLOW_GRPO.alpha / FLOW_GRPO.rank


def test_egrpos_are_the_configs_that_explain_it():
    for case, other in (("egrpo", flux_egrpo.get_config()), ("egrpo:emoji", emoji.get_config())):
        found = FILES["egrpo"]["get_config"](case.partition(":")[2])
        found.name, found.prompts_per_rollout = other.name, other.prompts_per_rollout
        assert found == other


def test_the_fast_run_is_the_papers_but_for_its_tails():
    paper, fast = (from_config_dict(TrainConfig, file.get_config()) for file in (flux_egrpo, flux_egrpo_fast))
    assert fast.plan.make_plan().rollout_passes == 400
    tails = {name: getattr(paper.plan, name) for name in ("tail_strides", "tail_steps")}
    assert dataclasses.replace(fast, name=paper.name, plan=dataclasses.replace(fast.plan, **tails)) == paper


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_unknown_variant_is_named_beside_those_there_are(name):
    with pytest.raises(ValueError, match=f"algorithms/{name}.py has the variants .*'emoji'.*, found 'harder'"):
        FILES[name]["get_config"]("harder")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_variant_has_its_command(path):
    for variant in FILES[path.stem]["VARIANTS"]:
        assert f"configs/algorithms/{path.name}{variant and ':'}{variant}" in FILES[path.stem]["__doc__"]
