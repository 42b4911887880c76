"""docs/algorithms.md: its numbers, its pictures and its example."""

import re
import sys

import numpy as np
import pytest
from PIL import Image

from docs import make_algorithms
from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.errors import ConfigError
from egrpo_jax.rl.algorithms.base import ALGORITHMS, Algorithm
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.algorithms.mix_grpo import MixGrpo
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.plan import AnchorPlan
from egrpo_jax.run.metrics import read_metrics
from egrpo_jax.training import loop as program
from egrpo_jax.training.config import TrainConfig
from tests import programs, toy

DOCUMENT = (programs.ROOT / "docs/algorithms.md").read_text()
ROWS = {row[0].strip("`"): row[1:] for row in re.findall(r"^\| (`\w+`)" + r" \| ([^|]+)" * 6 + r" \|$", DOCUMENT, re.M)}


def costs(plan):
    return (
        plan.rollout_passes,
        plan.training_passes,
        plan.update_equivalents(LearnerConfig()),
        plan.images,
    )


def section(title):
    return DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_algorithm_has_a_row_a_picture_and_a_section():
    assert ROWS.keys() == make_algorithms.FORMS.keys()
    assert ROWS.keys() >= ALGORITHMS.keys()
    pictures = set(re.findall(r"\]\(algorithms/(\w+)\.png\)", DOCUMENT))
    assert pictures == ROWS.keys() == {path.stem for path in make_algorithms.FOLDER.glob("*.png")}


@pytest.mark.parametrize("form", ROWS)
def test_the_table_is_what_the_plans_say(form):
    steps, _, *numbers = ROWS[form]
    plan = make_algorithms.algorithm(form).make_plan()
    forward, training, update, images = costs(plan)
    assert [int(number) for number in numbers] == [forward, training, forward + update, images]
    places = [int(number) for number in re.findall(r"\d+", steps)]
    assert (places or [0]) == ([1, len(plan.branches)] if isinstance(plan, AnchorPlan) else [len(plan.branches)])


@pytest.mark.parametrize("form", ROWS)
def test_pictures_are_small_and_of_the_plans_that_there_are(form):
    path = make_algorithms.FOLDER / f"{form}.png"
    assert path.stat().st_size < 40_000
    with Image.open(path) as picture:
        assert picture.text["Description"] == repr(make_algorithms.panels(form)), "run python -m docs.make_algorithms"


@pytest.mark.parametrize(
    ("title", "algorithm", "iteration"),
    [
        ("E-GRPO", {"algorithm": "egrpo"}, 0),
        ("G2RPO", {"algorithm": "g2rpo"}, 0),
        ("G2RPO", {"algorithm": "g2rpo", "granularities": (1, 2, 3)}, 0),
        ("AdaGRPO", {"algorithm": "ada_grpo"}, 0),
        ("TempFlow-GRPO", {"algorithm": "tempflow_grpo"}, 0),
        ("Flow-GRPO", {"algorithm": "flow_grpo"}, 0),
        ("Flow-GRPO", {"algorithm": "flow_grpo", "num_steps": 10}, 0),
        ("Flow-GRPO-Fast", {"algorithm": "flow_grpo_fast"}, 0),
        ("Flow-GRPO-Fast", {"algorithm": "flow_grpo_fast", "same_noise": True}, 0),
        ("DanceGRPO", {"algorithm": "dance_grpo"}, 0),
        ("MixGRPO", {"algorithm": "mix_grpo"}, 0),
        ("MixGRPO", {"algorithm": "mix_grpo"}, 275),
        ("MixGRPO", {"algorithm": "mix_grpo", "tail_share": 0.4}, 0),
        ("MixGRPO", {"algorithm": "mix_grpo", "tail_share": 0.2, "moves": "frozen"}, 99),
        ("BranchGRPO", {"algorithm": "branch_grpo"}, 0),
        ("DiffusionNFT", {"algorithm": "diffusion_nft"}, 0),
        ("AWM", {"algorithm": "awm"}, 0),
        ("V-GRPO", {"algorithm": "v_grpo"}, 0),
    ],
)
def test_costs_in_the_text_are_those_of_the_plans(title, algorithm, iteration):
    forward, training, _, images = costs(Algorithm.variant(algorithm)(**algorithm).make_plan(iteration))
    text = section(title)
    assert f"{forward} F" in text
    assert f"{training} B" in text
    assert images <= 100 or f"{images} images" in text


def test_what_else_the_text_counts():
    tails = EGrpo(tail_strides=(), tail_steps=(4,)).make_plan().rollout_passes
    assert f"forward passes to {tails}:" in section("Which one to take")
    mean = np.mean([MixGrpo().make_plan(iteration).rollout_passes for iteration in range(300)])
    assert f"{mean:.0f} F on average" in section("MixGRPO")
    exact = EGrpo(process="exact_sde").make_plan()
    assert f"lengths {' '.join(str(branch.merge) for branch in exact.branches)}." in section("E-GRPO")
    assert f"{exact.process.noise_level:g}" == "0.7"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "grows by a factor of {:.1f}, by"),
        ({"entropy_threshold": 0.0}, "by {:.1f} without merging"),
        ({"process": "exact_sde", "entropy_by": "noise"}, "κ grows by a factor of {:.1f} only"),
    ],
)
def test_how_much_late_steps_drown_early_ones(changes, text):
    plan = EGrpo(**changes).make_plan()
    steps = [(plan.times[branch.step], plan.times[branch.stop], branch.noise) for branch in plan.branches]
    kappas = [plan.process.jacobian(*step) / plan.process.std(*step) for step in steps]
    assert text.format(kappas[-1] / kappas[0]) in " ".join(section("E-GRPO").split())


@pytest.mark.parametrize(("changes", "percent"), [({"entropy_threshold": 0.0}, 5), ({}, 10)])
def test_how_much_too_noisy_steps_are(changes, percent):
    """n/t' of an Euler step, from its pull on the predicted noise."""
    plan = EGrpo(**changes).make_plan()
    excess = []
    for branch in plan.branches:
        time, end = plan.times[branch.step], plan.times[branch.stop]
        pull = (time - end) * branch.noise**2 / (2 * time)
        excess.append(np.hypot(end - pull, plan.process.std(time, end, branch.noise)) / end - 1)
    assert round(100 * max(excess)) == percent
    assert f"up to {percent} %" in " ".join(section("E-GRPO").split())


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The module of the document's example."""
    (code,) = re.findall(r"```python\n(# mine\.py\n.*?)```", section("A new algorithm"), re.S)
    assert len(code.splitlines()) <= 40
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


@pytest.mark.usefixtures("mine")
def test_the_example_costs_what_it_says():
    fork = Algorithm.variant({"algorithm": "mine:Fork"})()
    (first, *_, images), (seventh, *_) = costs(fork.make_plan(0)), costs(fork.make_plan(6))
    text = f"In the first iteration it costs {first} F + 4 B for {images} images, in the seventh {seventh} F + 4 B."
    assert text in section("A new algorithm")
    assert fork.make_plan().training_passes == 4
    assert [fork.make_plan(iteration).branches[0].step for iteration in range(8)] == [0, 1, 2, 3, 4, 5, 6, 0]
    with pytest.raises(ConfigError, match="group_size: found 6, expected 12"):
        Algorithm.variant({"algorithm": "mine:Fork"})(group_size=6)


def test_the_example_trains(mine):
    config = toy.get_config()
    config.plan = {"algorithm": "mine:Fork", "num_steps": 6, "group_size": 4, "splits": (2, 2)}
    changes = {"num_iterations": 2, "learner.updates": "joint", "evaluation.every": 100, "evaluation.batch": 200}
    config.update_from_flattened_dict(changes)
    program.train(from_config_dict(TrainConfig, config), mine / "run")
    lines = read_metrics(mine / "run" / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert all(line["ratio/on_policy_deviation"] <= 1e-6 for line in lines[1:])
    assert all(line["update_norm"] > 0 for line in lines[1:])
    assert lines[2]["compilations"] == 0  # the place has moved
