"""The program `plan` on CPU devices, and its parts."""

import dataclasses
import importlib.util
import re

import jax
import numpy as np
import pytest

from egrpo_jax.common.config import from_config_dict
from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.pipelines import ModelConfig, load_pipeline, sketch_pipeline
from egrpo_jax.pipelines.published import DANCE_GRPO, FLOW_GRPO, LoraOptions, PublishedOptions
from egrpo_jax.planning import changes
from egrpo_jax.planning.cost import count_passes, kept_beside, phase_cost, uncounted_scorers
from egrpo_jax.planning.devices import GIB, capacity, devices_at_hand, larger, slice_devices
from egrpo_jax.planning.phases import PHASES, named_arguments, sketch_job
from egrpo_jax.planning.report import overview, tables, trial_line, verdict
from egrpo_jax.rewards import ScorersConfig
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.optimizer import OptimConfig
from egrpo_jax.rl.plan import describe
from egrpo_jax.training.config import RewardsConfig, TrainConfig
from egrpo_jax.training.job import Job
from tests import programs, toy

TOY = from_config_dict(TrainConfig, toy.get_config())
FLUX = ModelConfig(name="published", path="black-forest-labs/FLUX.1-dev")


@pytest.fixture
def mesh():
    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        yield mesh


def numbers(line):
    return [float(number) for number in re.findall(r"\d+\.?\d*(?:e[+-]\d+)?", line)]


@pytest.mark.slow
def test_the_program_plans_for_virtual_devices(tmp_path):
    """End to end on 8: nobody repeats another's work, gradients are summed, the figure is drawn."""
    done = programs.run("plan", f"--config={programs.ROOT}/configs/emoji.py", "--devices=8", f"--draw={tmp_path}/p.png")
    assert done.returncode == 0, done.stderr
    assert "16 prompts, 512 images" in done.stdout
    assert "8 devices, cpu: data 8, fsdp 1, tensor 1; memory unknown" in done.stdout
    operations = done.stdout.split("an iteration, of a device")[1].splitlines()
    by_phase = {line.split()[0]: line for line in operations if line.strip()}
    assert numbers(by_phase["rollout"])[1] == pytest.approx(1, abs=0.01)
    assert numbers(by_phase["update"])[1] == pytest.approx(1, abs=0.01)
    assert "nothing" in by_phase["rollout"]
    assert "all-reduce" in by_phase["update"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_every_phase_of_the_toy_run(mesh):
    job = sketch_job(TOY)
    assert overview(job, mesh, 0.4).startswith(describe(job.plan))
    costs = {phase: phase_cost(job, mesh, phase) for phase in PHASES}
    # 12 x 12 weights, 12 biases, 3 x 12 for text, in float32; two moments, a count and the learning rate; an average.
    weights = 4 * (12 * 12 + 12 + 3 * 12)
    update = costs["update"].compiled.arguments
    assert (update["trained weights"], update["averages and copies"], update["frozen weights"]) == (weights, weights, 0)
    assert 2 * weights <= update["moments"] <= 2 * weights + 16
    assert costs["rollout"].beside == {"moments": update["moments"], "averages and copies": weights}
    # By hand: [4, 12] x [12, 12] for latents, [3] x [3, 12] for text, which is computed once for an anchor's steps.
    passes, latents, text = count_passes(job), 2 * 4 * 12 * 12, 2 * 3 * 12
    expected = (passes.shared + passes.own) * latents + (8 + passes.own) * text
    assert costs["rollout"].compiled.work.flops == expected
    assert all(cost.fits for cost in costs.values())
    assert "unknown" not in verdict(job, mesh, list(costs.values()))


def test_a_phase_that_does_not_fit_is_tried_with_changes(mesh, monkeypatch):
    job = sketch_job(dataclasses.replace(TOY, tails_per_device=8))
    enough = phase_cost(job, mesh, "rollout").needed
    monkeypatch.setattr("egrpo_jax.planning.cost.capacity", lambda _: enough - 1)
    cost = phase_cost(job, mesh, "rollout")
    assert not cost.fits
    assert "rollout: does not fit" in verdict(job, mesh, [cost])
    trials = {trial.text: trial for trial in changes.try_changes(job, mesh, cost, None)}
    assert trials["--config.tails_per_device=4"].is_compiled
    assert trials["--config.optim.offload=True"].fits
    assert trials["--config.optim.first_moment_dtype=bfloat16"].fits
    assert trial_line(trials["--config.optim.first_moment_dtype=bfloat16"]).startswith("  fits: --config.optim")
    monkeypatch.setattr("egrpo_jax.planning.cost.capacity", lambda _: 1000)
    for trial in changes.try_changes(job, mesh, phase_cost(job, mesh, "rollout"), None):
        assert not trial.fits
        assert not trial.is_compiled  # what it holds is too much by itself


@pytest.mark.parametrize(
    ("options", "proposed"),
    [
        (PublishedOptions(lora=DANCE_GRPO), ["--config.model.published.int8_base=True"]),
        (PublishedOptions(lora=DANCE_GRPO, int8_base=True), []),
        (PublishedOptions(), ["--config.model.published.lora=LoraOptions() --config.model.published.int8_base=True"]),
    ],
)
def test_a_base_in_int8_is_tried_for_adapters(mesh, options, proposed):
    job = sketch_job(TrainConfig(model=dataclasses.replace(FLUX, published=options)))
    found = {change.text: change.config.model.published for change in changes.changes(job, mesh, "decode", None)}
    assert [text for text in found if "int8" in text] == proposed
    assert all(found[text].int8_base and found[text].lora == (options.lora or LoraOptions()) for text in proposed)


def test_one_more_pass_before_several_updates(mesh):
    del mesh
    job = sketch_job(TOY)
    prompts, active = 8, len(job.plan.branches)
    joint = dataclasses.replace(TOY, learner=dataclasses.replace(TOY.learner, updates="joint"))
    assert count_passes(job).scoring == prompts * active
    assert count_passes(sketch_job(joint)).scoring == 0
    assert job.plan.update_equivalents(job.config.learner) == 4 * active
    assert job.plan.update_equivalents(joint.learner) == 3 * active


def test_choosing_among_prompts_comes_before_the_rollout(mesh):
    """3 candidates for each of 8 prompts, 6 steps of the grid, tails of 5 and 3 steps from 4 samples each."""
    del mesh
    job = sketch_job(from_config_dict(TrainConfig, toy.get_config("ada_grpo")))
    passes = count_passes(job)
    assert (passes.screening, passes.shared, passes.own) == (8 * 3 * 6, 0, 8 * 4 * (5 + 3))
    assert passes.images == 8 * (3 + 2 * 4)


def test_epochs_repeat_the_passes_of_the_update_alone(mesh):
    joint = sketch_job(dataclasses.replace(TOY, learner=LearnerConfig(epochs=3)))
    states = 8 * len(joint.plan.branches)
    passes = count_passes(joint)
    assert (passes.training, passes.scoring) == (3 * states, states)
    assert 8 * joint.plan.update_equivalents(joint.config.learner) == 3 * passes.training + passes.scoring
    once = sketch_job(dataclasses.replace(TOY, learner=LearnerConfig()))
    work = [phase_cost(job, mesh, "update").compiled.work.flops for job in (once, joint)]
    assert work[1] / work[0] == pytest.approx((3 * 3 + 1) / 3, rel=0.05)


def test_scorers_take_memory_as_far_as_they_are_known(mesh):
    rewards = RewardsConfig(
        train=("hpsv2.1", "imagereward"), weights=(1.0, 1.0), heldout=("jpeg_compressibility", "a:b")
    )
    job = sketch_job(dataclasses.replace(TOY, rewards=rewards))
    assert kept_beside(job, mesh, "update") == {"scorers": 4 * (986_109_441 + 446_206_689)}
    assert uncounted_scorers(job.config, mesh) == ["a:b"]
    offloaded = dataclasses.replace(job.config, scorers=ScorersConfig(offload=True))
    assert kept_beside(dataclasses.replace(job, config=offloaded), mesh, "update") == {}


def test_flux_is_described_without_its_files():
    pipeline = sketch_pipeline(FLUX)
    parameters = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(pipeline.abstract_params["flow"]))
    assert parameters == pytest.approx(11.9e9, rel=0.01)
    assert pipeline.conditioning.text.shape == (512, 4096)
    assert pipeline.training_flops == 4 * pipeline.forward_flops  # blocks are computed again
    assert set(pipeline.encoder_params) == {"t5", "clip"}
    for call in (pipeline.read, pipeline.encode):
        with pytest.raises(UserError, match="by its sizes alone"):
            call({})
    options = PublishedOptions(embeddings="made_elsewhere", lora=FLOW_GRPO, text_tokens=256)
    schnell = sketch_pipeline(ModelConfig("published", "black-forest-labs/FLUX.1-schnell", options))
    assert schnell.encoder_params == {}
    assert "guidance_in" in str(pipeline.abstract_params["flow"])
    assert "guidance_in" not in str(schnell.abstract_params["flow"])
    assert schnell.training_flops == 3 * schnell.forward_flops  # no gradients of the base


def test_a_pipeline_of_ones_own_must_describe_its_conditioning(monkeypatch):
    config = ModelConfig("tests.toy:pipeline")
    described = load_pipeline(config)
    assert sketch_pipeline(config).latents_shape == described.latents_shape
    monkeypatch.setattr(toy, "pipeline", lambda _: dataclasses.replace(described, conditioning=None))
    with pytest.raises(ConfigError, match=r"config\.model\.name: found 'tests\.toy:pipeline', expected .*conditioning"):
        sketch_pipeline(config)


def test_memory_of_flux_beside_a_rollout(mesh):
    """Moments of 11.9 B weights in float32, T5 and CLIP in bfloat16; HPSv2.1 in float32."""
    rewards = RewardsConfig(train=("hpsv2.1",))
    job = sketch_job(TrainConfig(model=FLUX, rewards=rewards, prompts_per_iteration=8, prompts_per_rollout=2))
    assert isinstance(job, Job)
    beside = kept_beside(job, mesh, "rollout")
    arguments = named_arguments(job, mesh, "update")
    assert beside["moments"] == pytest.approx(2 * 4 * 11.9e9, rel=0.01)
    assert beside["text encoders"] == pytest.approx(2 * (4.762e9 + 0.123e9), rel=0.01)
    assert beside["scorers"] == 4 * 986_109_441
    assert beside["steps"] == pytest.approx(6 * 8 * 13 * 2025 * 64 * 4, rel=0.01)  # of the 6 prompts before
    assert arguments["trained weights"] == pytest.approx(4 * 11.9e9, rel=0.01)
    options = PublishedOptions(offload_encoders=True)
    resting = sketch_job(
        TrainConfig(
            model=ModelConfig("published", FLUX.path, options),
            optim=OptimConfig(offload=True),
            rewards=rewards,
            scorers=ScorersConfig(offload=True),
        )
    )
    assert set(kept_beside(resting, mesh, "decode")) == {"steps", "moments"}
    assert kept_beside(resting, mesh, "decode")["moments"] < 100  # counts
    assert named_arguments(resting, mesh, "update")["moments"] < 100


@pytest.mark.parametrize(
    ("topology", "expected"),
    [("v5p:2x2x1", "v5p:2x2x2"), ("v5p:2x2x2", "v5p:2x2x4"), ("v5p:2x2x4", "v5p:2x4x4"), ("v6e:2x4", "v6e:4x4")],
)
def test_the_next_larger_slice(topology, expected):
    assert larger(topology) == expected


class Chip:
    platform = "tpu"

    def __init__(self, device_kind):
        self.device_kind = device_kind


def test_memory_of_devices():
    assert capacity(Chip("TPU v5")) == 95.74 * GIB
    assert capacity(Chip("TPU v5 lite")) == 15.75 * GIB
    assert capacity(jax.devices()[0]) is None
    with pytest.raises(UserError, match="--devices: found 1000, expected as many as there are here"):
        devices_at_hand(1000)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--topology=v5p:2x2x1", "--devices=4"], "--devices: found it beside --topology, expected one of them"),
        (["--config.mesh.fsdp=3"], r"config.mesh: found \(-1, 3, 1\), expected axes that multiply to the 1 devices.*"),
        (["--devices=0"], "flag --devices=0: .*"),
        (["--phase=train"], "flag --phase=train: .*"),
        (["--config.model.name=published"], "config.model.path: found None, expected the folder of a pipeline.*"),
    ],
)
def test_mistakes_are_one_line(arguments, line):
    done = programs.call("plan", f"--config={programs.ROOT}/configs/emoji.py", *arguments)
    assert done.returncode == 2
    assert re.fullmatch(f"error: {line}\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("message", "gibibytes"),
    [
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 34.30G of 31.25G hbm. Exc",
            34.3,
        ),
        ("the total memory required for HLO temporaries (1.50T) exceeds available HBM (31.25G).", 1536),
    ],
)
def test_a_program_that_the_compiler_refuses(mesh, monkeypatch, message, gibibytes):
    """Too large a phase is a result; any other error of the compiler is one."""
    error = jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")
    job = sketch_job(TOY)
    monkeypatch.setattr("jax.stages.Lowered.compile", raises(error))
    cost = phase_cost(job, mesh, "update")
    assert not cost.fits
    assert cost.compiled.refused == gibibytes * GIB
    assert cost.largest[0] == "temporaries"
    assert f"update: {gibibytes:.2f} GiB a device; the largest part is temporaries" in verdict(job, mesh, [cost])
    assert "refused by the compiler" in tables([cost])
    other = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 16.95M of 16.00M vmem.")
    monkeypatch.setattr("jax.stages.Lowered.compile", raises(other))
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        phase_cost(job, mesh, "update")


def raises(error):
    def function(*_, **__):
        raise error

    return function


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="only without the extra `tpu`")
def test_without_the_compiler_for_tpus():
    with pytest.raises(UserError, match=r"no compiler for TPUs, expected pip install 'egrpo_jax\[tpu\]'"):
        slice_devices("v5p:2x2x1")
