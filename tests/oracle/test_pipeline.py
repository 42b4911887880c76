"""Live: the same pipeline folder, sampled, trained and exported by us, in diffusers."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")

from tests import programs
from tests.oracle import pipeline as oracle


def run(program, config, *arguments):
    done = programs.run(program, f"--config=tests/tiny_flux.py:{config}", *arguments)
    assert done.returncode == 0, done.stderr


def sampled(config, out, prompts, *arguments):
    """Images `[P, H, W, 3]` in [0, 1], rounded to 1/255."""
    flags = (f"--prompt_file={prompts}", f"--out={out}", "--grid=pipeline", f"--steps={oracle.STEPS}")
    run("sample", config, *flags, *arguments)
    entries = json.loads((out / "samples.json").read_text())["samples"]
    return np.stack([np.asarray(Image.open(out / entry["file"])) for entry in entries]) / 255


def assert_same_image(ours, theirs):
    """Within 1/255, half of which is the rounding of ours."""
    assert np.abs(ours - theirs).max() <= 1 / 255
    assert theirs.std() > 0.1


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(oracle, "PROMPTS", oracle.PROMPTS[:2])  # a prompt file has no empty prompt
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(oracle.PROMPTS))
    return path


def test_the_golden_is_what_diffusers_makes_today():
    with np.load(oracle.GOLDEN) as golden:
        for name, images in oracle.cases().items():
            np.testing.assert_allclose(golden[name], images, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux_dev", "sd3_medium", "flux2_base", "z_image"])
def test_a_folder_that_diffusers_saved(tmp_path, prompts, name):
    saved = tmp_path / "saved"
    theirs = oracle.load(oracle.FOLDERS[name](tmp_path / "ours"))
    theirs.save_pretrained(saved)
    assert_same_image(sampled(saved, tmp_path / "images", prompts), oracle.images(theirs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("flux_dev", ""),
        ("flux_dev", ",lora"),
        ("sd3_medium", ""),
        ("sd3_medium", ",lora"),
        ("flux2_base", ",lora"),
        ("z_image", ",lora"),
    ],
)
def test_what_was_trained_loads_in_diffusers(tmp_path, prompts, name, lora):
    base, run_of = tmp_path / "base", f"--workdir={tmp_path / 'run'}"
    oracle.load(oracle.FOLDERS[name](tmp_path / "ours")).save_pretrained(base)  # a folder that diffusers wrote
    config = f"{base}{lora}"
    run("train", config, run_of, f"--config.prompts={prompts}", f"--config.evaluation.prompts={prompts}")
    ours = sampled(config, tmp_path / "images", prompts, run_of)
    assert np.abs(ours - oracle.images(oracle.load(base))).max() > 4 / 255

    def converted(form, *arguments):
        run("convert", config, run_of, f"--to={form}", f"--out={tmp_path / form}", "--dtype=float32", *arguments)
        return tmp_path / form

    assert_same_image(ours, oracle.images(oracle.load(converted("pipeline", "--rest=copy"))))
    pipeline = oracle.load(base)
    pipeline.transformer = type(pipeline.transformer).from_pretrained(converted("diffusers"))
    assert_same_image(ours, oracle.images(pipeline))
    if lora:
        pipeline = oracle.load(base)
        pipeline.load_lora_weights(converted("peft"))
        assert_same_image(ours, oracle.images(pipeline))
