"""The program `sample`, from the assets and from a run's workdir."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from egrpo_jax.evaluation import samples
from tests import programs, tiny_flux

PROMPTS = ["--prompt=red heart", '--prompt=a "cat", or a dog']
TOY = "--config=tests/toy.py"


def sample(*arguments):
    return programs.call("sample", *PROMPTS, *arguments)


def sheet(out, *arguments):
    done = sample(f"--out={out}", *arguments)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as image:
        return np.asarray(image), done.stdout


@pytest.mark.slow
def test_the_program_as_a_person_starts_it(tmp_path):
    done = programs.run("sample", "--config=configs/emoji.py", *PROMPTS, "--steps=2", f"--out={tmp_path}/x.png")
    assert (done.returncode, done.stdout) == (0, f"2 images from the config's weights: {tmp_path}/x.png\n")
    with Image.open(tmp_path / "x.png") as image:
        assert image.width == 8 + 2 * 168


def test_a_sheet_from_the_config_and_from_a_run(tmp_path):
    first, printed = sheet(tmp_path / "a.png", TOY)
    assert "2 images from the config's weights" in printed
    again, _ = sheet(tmp_path / "b.png", TOY)
    other, _ = sheet(tmp_path / "c.png", TOY, "--seed=1")
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()

    workdir = tmp_path / "run"
    done = programs.call("train", TOY, f"--workdir={workdir}", "--config.num_iterations=1")
    assert done.returncode == 0, done.stderr
    trained, printed = sheet(tmp_path / "d.png", f"--workdir={workdir}")
    assert f"2 images from {workdir}, iteration 1" in printed
    assert trained.shape == first.shape
    assert (trained != first).any()
    np.testing.assert_array_equal(sheet(tmp_path / "e.png", TOY, f"--workdir={workdir}")[0], trained)
    done = sample(TOY, f"--workdir={workdir}", "--config.learner.ema_decay=0.5", f"--out={tmp_path}/f.png")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: config.learner.ema_decay is 0.5, but the run in {workdir} was trained with 0.9")


def test_a_job_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    arguments = [TOY, "--prompt_file=emoji_heldout", "--batch=64", "--steps=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert programs.call("sample", *arguments, f"--out={whole}").returncode == 0

    add = samples.Folder.add

    def interrupted(self, first, images):
        add(self, first, images)
        if first:
            raise KeyboardInterrupt

    monkeypatch.setattr(samples.Folder, "add", interrupted)
    done = programs.call("sample", *arguments, f"--out={parts}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert len(list(parts.glob("0*.png"))) == 100  # two batches of four: 200 prompts are spread evenly
    monkeypatch.undo()
    for change, line in (("--seed=1", "seed was 0, now 1"), ("--solver=dpm2m", "solver was 'euler', now 'dpm2m'")):
        done = programs.call("sample", *arguments, change, f"--out={parts}")
        assert (done.returncode, line in done.stderr) == (2, True)
    done = programs.call("sample", *arguments, f"--out={parts}")
    assert done.stdout.endswith("(100 were there already)\n")
    files = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert len(files) == 202
    assert files == {path.name: path.read_bytes() for path in parts.iterdir()}
    assert json.loads(files["samples.json"])["model"]["name"] == "tests.toy:pipeline"


def test_images_are_written_as_they_come_and_kept_no_longer(tmp_path, monkeypatch):
    add, written, kept = samples.Folder.add, [], []

    def watched(self, first, images):
        written.append(len(list((tmp_path / "out").glob("0*.png"))))
        kept.append(sum(len(array) for array in jax.live_arrays() if array.shape[1:] == images.shape[1:]))
        add(self, first, images)

    monkeypatch.setattr(samples.Folder, "add", watched)
    done = programs.call(
        "sample", TOY, "--prompt_file=emoji_heldout", "--batch=50", "--steps=2", f"--out={tmp_path}/out"
    )
    assert done.returncode == 0, done.stderr
    assert written == [0, 50, 100, 150]
    assert 0 < max(kept) <= 100  # this batch and the next one, which is under way


@pytest.mark.slow
def test_a_decoder_that_is_not_finite_gives_no_black_image(tmp_path):
    folder = tiny_flux.write_pipeline(tmp_path / "base")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"][:] = np.nan
    save_file(tensors, file)
    done = programs.call("sample", f"--config=tests/tiny_flux.py:{folder}", "--prompt=a cat", f"--out={tmp_path}/out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "the image of the prompt 'a cat' is not finite" in line
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PROMPTS, "--workdir={}/nothing"], "found no config.json in {}/nothing"),
        (["--prompt= "], "--prompt: found ' ', expected a text"),
        ([], "expected --prompt, once for each prompt, or --prompt_file"),
        (["--prompts=a,b"], "Unknown command line flag 'prompts'. Did you mean: prompt"),
        ([*PROMPTS, "--out={}/file/x.png"], "cannot write {}/file/x.png"),
        ([*PROMPTS, "--out={}/x.bmp"], "expected one of the endings"),
        ([*PROMPTS, "--seed=-1"], "--seed"),
        ([*PROMPTS, "--seed=4294967296"], "--seed"),
        ([*PROMPTS, "--seed=18446744073709551616"], "--seed"),
    ],
)
def test_bad_input_is_told_before_anything_is_loaded(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("egrpo_jax.pipelines.load_pipeline", None)
    (tmp_path / "file").write_text("")
    arguments = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    done = programs.call("sample", TOY, f"--out={tmp_path}/x.png", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message.replace("{}", str(tmp_path)) in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
