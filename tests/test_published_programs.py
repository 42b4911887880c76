"""Published models from their folders through every program and back, on pipelines in miniature."""

import json
import re
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_dtypes import bfloat16
from PIL import Image
from safetensors.numpy import load_file

from egrpo_jax.run.metrics import read_metrics
from tests import programs, tiny_flux, tiny_qwen, tiny_sd3

PROMPTS = ["a red cat", "dog 7, 3"]


FAMILIES = {
    "flux": tiny_flux.write_pipeline,
    "sd3": tiny_sd3.write_pipeline,
    "flux2": tiny_qwen.write_flux2,
    "z_image": tiny_qwen.write_z_image,
}

GUIDED = [name for name in FAMILIES if name != "flux"]


def written(folder, family="flux"):
    """A pipeline folder, with two prompts beside it."""
    pipeline = FAMILIES[family](folder / "pipeline")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return written(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base_images(base, tmp_path_factory):
    return sampled(base, tmp_path_factory.mktemp("base_images"))


def run(program, config, *arguments):
    done = programs.run(program, f"--config=tests/tiny_flux.py:{config}", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read_folder(folder):
    samples = json.loads((folder / "samples.json").read_text())["samples"]
    return np.stack([np.asarray(Image.open(folder / entry["file"])) for entry in samples])


def prompt_file(base):
    return f"--prompt_file={base.parent / 'prompts.txt'}"


def sampled(base, out, config=None, *arguments):
    run("sample", config or base, prompt_file(base), f"--out={out}", *arguments)
    return read_folder(out)


def trained(base, workdir, config, *arguments):
    """Two iterations; the workdir."""
    prompts = base.parent / "prompts.txt"
    chosen = (f"--config.prompts={prompts}", f"--config.evaluation.prompts={prompts}")
    run("train", config, f"--workdir={workdir}", *chosen, *arguments)
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert all(line["ratio/on_policy_deviation"] <= 1e-6 for line in lines[1:])
    assert all(line["update_norm"] > 0 for line in lines[1:])
    return workdir


def apart(a, b):
    """The largest difference of two images, in grey levels."""
    return np.abs(a.astype(int) - b.astype(int)).max()


@pytest.mark.slow
def test_images_do_not_depend_on_the_batch_and_are_described(base, tmp_path):
    together = sampled(base, tmp_path / "a", None, "--grid=pipeline", "--steps=3")
    alone = sampled(base, tmp_path / "b", None, "--grid=pipeline", "--steps=3", "--batch=1")
    assert apart(together, alone) <= 1
    assert apart(together[0], together[1]) > 20
    described = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert [entry["prompt"] for entry in described["samples"]] == PROMPTS
    assert described["steps"] == 3
    assert described["seed"] == 0
    # 4 tokens, below FLUX.1's 256: a shift of 1.5799.
    np.testing.assert_allclose(described["times"], [1, 0.7596, 0.4413, 0], atol=1e-4)
    assert described["about"]["guidance"] == 3.5
    assert (tmp_path / "a" / "grid.png").is_file()


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize("family", GUIDED)
def test_a_run_that_is_resumed_ends_as_one_that_never_stopped(family, tmp_path):
    base = written(tmp_path, family)
    prompts = [f"--config.{key}prompts={tmp_path / 'prompts.txt'}" for key in ("", "evaluation.")]
    for name, parts in (("straight", (2,)), ("resumed", (1, 2))):
        for iterations in parts:
            number = (f"--config.num_iterations={iterations}", "--allow_config_change")
            run("train", base, f"--workdir={tmp_path / name}", *prompts, *number)
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("straight", "resumed"))
    same = [key for key in first if not re.match(r"seconds|images_per|memory|mfu|eval|compilations", key)]
    assert {key: first[key] for key in same} == {key: second[key] for key in same}
    images = [
        sampled(base, tmp_path / f"{n}_images", None, f"--workdir={tmp_path / n}") for n in ("straight", "resumed")
    ]
    np.testing.assert_array_equal(*images)


@pytest.mark.slow
@pytest.mark.mesh
@pytest.mark.parametrize("family", GUIDED)
def test_a_guided_model_is_planned_and_judged(family, tmp_path):
    base = written(tmp_path, family)
    planned = run("plan", f"{base},lora")
    assert "for each prompt: " in planned
    assert "each of them 2 of the model, with guidance" in planned
    out = tmp_path / "evaluation"
    run("evaluate", base, prompt_file(base), f"--out={out}", "--rewards=tests.toy:brightness", "--steps=2")
    assert json.loads((out / "table.json").read_text())["protocol"]["base"]["guidance"] > 1


@pytest.mark.slow
def test_all_weights_are_trained_and_given_back(base, base_images, tmp_path):
    workdir = trained(base, tmp_path / "run", base)
    expected = sampled(base, tmp_path / "run_images", None, f"--workdir={workdir}")
    assert apart(expected, base_images) > 1

    run("convert", base, f"--workdir={workdir}", "--to=orbax", f"--out={tmp_path / 'orbax'}", "--dtype=float32")
    again = sampled(base, tmp_path / "orbax_images", None, f"--config.model.published.transformer={tmp_path / 'orbax'}")
    assert apart(again, expected) <= 1
    whole = tmp_path / "whole"
    run("convert", base, f"--workdir={workdir}", "--to=pipeline", f"--out={whole}", "--dtype=float32")
    assert apart(sampled(base, tmp_path / "whole_images", whole), expected) <= 1
    assert (whole / "vae").is_symlink()
    assert json.loads((whole / "transformer" / "config.json").read_text())["_class_name"] == "FluxTransformer2DModel"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", *(pytest.param(name, marks=pytest.mark.mesh) for name in GUIDED)])
def test_adapters_are_trained_on_stored_embeddings_and_given_back(family, tmp_path):
    base = written(tmp_path, family)
    base_images = sampled(base, tmp_path / "base_images")
    encoded = ("--shard_size=1", f"--out={tmp_path / 'embeddings'}", prompt_file(base))
    count = 2 if family == "flux" else 3  # and the negative prompt
    assert f"{count} prompts encoded, 0 were there already" in run("encode", base, *encoded)
    assert f"0 prompts encoded, {count} were there already" in run("encode", base, *encoded)
    without_text = tmp_path / "without_text"
    shutil.copytree(base, without_text, ignore=shutil.ignore_patterns("text_encoder*", "tokenizer*"))
    stored = f"--config.model.published.embeddings={tmp_path / 'embeddings'}"

    lora = f"{without_text},lora"
    workdir = trained(base, tmp_path / "run", lora, stored)
    expected = sampled(base, tmp_path / "run_images", lora, stored, f"--workdir={workdir}")
    on_the_fly = sampled(base, tmp_path / "fly_images", f"{base},lora", f"--workdir={workdir}")
    assert apart(on_the_fly, expected) <= 1
    assert apart(base_images, expected) > 1

    run("convert", lora, stored, f"--workdir={workdir}", "--to=peft", f"--out={tmp_path / 'adapters'}")
    file = tmp_path / "adapters" / "pytorch_lora_weights.safetensors"
    again = sampled(base, tmp_path / "peft_images", f"{base},lora", f"--config.model.published.lora_weights={file}")
    assert apart(again, expected) <= 1
    merged = tmp_path / "merged"
    run("convert", lora, stored, f"--workdir={workdir}", "--to=diffusers", f"--out={merged}", "--dtype=float32")
    again = sampled(base, tmp_path / "merged_images", None, f"--config.model.published.transformer={merged}")
    assert apart(again, expected) <= 1


@pytest.mark.slow
def test_adapters_to_a_base_in_int8_are_merged_into_the_published_one(base, tmp_path):
    workdir = trained(base, tmp_path / "run", f"{base},int8,bfloat16", "--config.optim.learning_rate=0.01")
    for form in ("peft", "diffusers"):
        out = (f"--workdir={workdir}", f"--to={form}", f"--out={tmp_path / form}", "--dtype=float32")
        assert programs.run("convert", *out).returncode == 0
    adapters, published, merged = (
        load_file(next(folder.glob("*.safetensors")))
        for folder in (tmp_path / "peft", base / "transformer", tmp_path / "diffusers")
    )
    changed = 0
    for name, weights in published.items():
        exact = weights.astype(bfloat16).astype(np.float32)  # as a run in bfloat16 holds them without int8
        module = f"transformer.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in adapters:
            exact = exact + adapters[f"{module}.lora_B.weight"] @ adapters[f"{module}.lora_A.weight"]
            changed += 1
        np.testing.assert_allclose(merged[name], exact, rtol=2**-8, atol=1e-6, err_msg=name)
    assert changed == len(adapters) / 2 > 0


def test_an_orbax_checkpoint_that_cannot_be_written_is_one_line(base, tmp_path, monkeypatch):
    def save(*_):
        raise ValueError("Error writing \"kernel/0.0\" in OCDBT database: File too large [os_error_code='27']")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", save)
    done = programs.call("convert", f"--config=tests/tiny_flux.py:{base}", "--to=orbax", f"--out={tmp_path}/new")
    assert (done.returncode, done.stderr) == (2, f"error: cannot write {tmp_path}/new: File too large\n")
    assert list(tmp_path.iterdir()) == []
