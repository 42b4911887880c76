"""Where sampled images go."""

import json

import numpy as np
import pytest
from PIL import Image

from egrpo_jax.common.errors import UserError
from egrpo_jax.evaluation import samples
from egrpo_jax.evaluation.samples import open_samples

PROMPTS = ["a", "b, c", 'say "d"', "e", "f"]
SETTINGS = {"weights": "the config's weights", "seed": 0, "model": {"name": "toy", "sizes": (1, 2)}}
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), dtype=np.uint8)


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def folder(out, until=5, settings=SETTINGS, prompts=PROMPTS):
    """Begins and adds images up to `until`; returns how many were there, and the open folder."""
    opened = open_samples(out, prompts)
    done = opened.begin(settings)
    if done < until:
        opened.add(done, IMAGES[done:until])
    return done, opened


def test_a_folder_holds_every_image_with_its_prompt(tmp_path):
    _, opened = folder(tmp_path / "out")
    opened.finish()
    described = json.loads((tmp_path / "out" / "samples.json").read_text())
    assert described["seed"] == 0
    assert [entry["prompt"] for entry in described["samples"]] == PROMPTS
    for entry, image in zip(described["samples"], IMAGES, strict=True):
        np.testing.assert_array_equal(read(tmp_path / "out" / entry["file"]), image)
    assert read(tmp_path / "out" / "grid.png").ndim == 3
    assert len(list((tmp_path / "out").iterdir())) == 7


def test_a_folder_goes_on_where_it_was(tmp_path):
    assert folder(tmp_path, until=2)[0] == 0
    assert folder(tmp_path, until=3)[0] == 2
    done, opened = folder(tmp_path)
    assert done == 3
    opened.finish()
    whole = folder(tmp_path / "whole")[1]
    whole.finish()
    assert folder(tmp_path)[0] == 5
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "prompts", "message"),
    [
        (SETTINGS | {"seed": 1}, PROMPTS, "made otherwise: seed was 0, now 1; name a new folder"),
        (SETTINGS | {"weights": "run, iteration 3"}, PROMPTS, "weights was"),
        (SETTINGS, ["a", "b"], "of other prompts"),
    ],
)
def test_other_images_are_not_mixed_in(tmp_path, settings, prompts, message):
    folder(tmp_path, until=2)
    before = sorted(path.read_bytes() for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        folder(tmp_path, settings=settings, prompts=prompts)
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("record", [None, "{", "7"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, record):
    (tmp_path / "mine.txt").write_text("precious")
    if record is not None:
        (tmp_path / "samples.json").write_text(record)
    with pytest.raises(UserError, match=r"cannot read .*samples\.json.*name a new folder"):
        folder(tmp_path)


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "webp"])
def test_a_sheet_in_the_format_of_its_ending(tmp_path, ending):
    out = tmp_path / f"sheet.{ending}"
    sheet = open_samples(out, PROMPTS[:2])
    assert sheet.begin(SETTINGS) == 0
    bright = np.full((2, 32, 32, 3), 200, np.uint8)
    sheet.add(0, bright[:1])
    sheet.add(1, bright[1:])
    sheet.finish()
    with Image.open(out) as image:
        assert image.format == {"png": "PNG", "webp": "WEBP"}.get(ending, "JPEG")
        np.testing.assert_allclose(np.asarray(image)[20:150, 20:150], 200, atol=2)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_large_images_are_kept_small(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "_SHEET_SIDE", 400)
    sheet = open_samples(tmp_path / "x.png", PROMPTS[:3])
    sheet.begin(SETTINGS)
    sheet.add(0, np.zeros((3, 300, 600, 3), np.uint8))
    assert [thumbnail.shape for thumbnail in sheet._thumbnails] == [(100, 200, 3)] * 3


def test_a_grid_shows_a_bounded_number(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "SHOWN", 4)
    _, opened = folder(tmp_path / "few")
    opened.finish()
    assert read(tmp_path / "few" / "grid.png").shape[1] < 3 * 160  # two in a row, not three
    with pytest.raises(UserError, match="a sheet holds 4 images, found 5 prompts; name a folder"):
        open_samples(tmp_path / "x.png", PROMPTS)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/x.png", "cannot write .*file/x.png: Not a directory"),
        ("file/deep/folder", "cannot write .*file/deep/folder: Not a directory"),
        ("file", "cannot write .*file: Not a directory"),
        ("folder.png", r"cannot write .*folder\.png: it is a folder"),
        ("x" * 300, "File name too long"),
        ("x" * 300 + ".png", "File name too long"),
        ("x.gif", r"x\.gif: expected one of the endings \.png, \.jpg, \.jpeg, \.webp, or a folder"),
    ],
)
def test_what_cannot_be_written_is_told_first(tmp_path, out, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=message):
        open_samples(tmp_path / out, PROMPTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_what_can_be_written_leaves_nothing_until_it_begins(tmp_path):
    open_samples(tmp_path / "a" / "b", PROMPTS)
    open_samples(tmp_path / "a" / "x.png", PROMPTS)
    assert not list(tmp_path.iterdir())
