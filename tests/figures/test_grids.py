import numpy as np
import pytest
from PIL import Image

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.images import to_uint8
from egrpo_jax.figures.grids import before_after, grid, save_image, stack


def flat(*values, size=32):
    """One image of a single grey per value."""
    return np.broadcast_to(np.array(values, np.float32)[:, None, None, None], (len(values), size, size, 3))


def dark_rows(image, left, right):
    """Which pixel rows hold something dark between two columns."""
    return np.flatnonzero((np.asarray(image)[:, left:right] < 60).any(axis=(1, 2)))


def test_grid_places_every_pixel():
    images = np.random.default_rng(0).uniform(size=(3, 2, 2, 3))
    sheet = np.asarray(grid(images, columns=2, scale=5))
    for index, (row, column) in enumerate([(0, 0), (0, 1), (1, 0)]):
        top, left = 8 + row * (10 + 4 + 8), 8 + column * (10 + 8)
        tile = sheet[top : top + 10, left : left + 10]
        np.testing.assert_array_equal(tile[::5, ::5], to_uint8(images[index]))
        np.testing.assert_array_equal(tile, np.repeat(np.repeat(tile[::5, ::5], 5, 0), 5, 1))
    assert (sheet[-22:, -18:] == 255).all()


def test_an_image_that_is_not_finite_is_no_black_one():
    images = np.array(flat(0.0, 0.5))
    images[0, 3, 3, 0] = np.nan
    sheet = np.asarray(grid(images, columns=2, scale=1))
    assert (sheet[8:40, 8:40] == (255, 0, 255)).all()
    assert (sheet[8:40, 48:80] == 128).all()


@pytest.mark.parametrize(("size", "shown"), [(32, 160), (64, 192), (512, 512)])
def test_small_images_are_enlarged(size, shown):
    assert grid(flat(0.5, size=size), columns=1).width == shown + 16


def test_captions_stay_below_their_image():
    long = "a caption that goes on and on, far beyond the three lines which the width of one image leaves for it"
    plain, captioned = (grid(flat(1, 1), 2, captions) for captions in (None, ["short", long]))
    short_rows, long_rows = dark_rows(captioned, 8, 168), dark_rows(captioned, 176, 336)
    assert short_rows.min() > 168
    assert len(short_rows) < 19
    assert 2 * 19 < np.ptp(long_rows) < 3 * 19
    assert long_rows.max() < captioned.height - 8
    assert captioned.height == plain.height + 3 * 19
    edges = np.asarray(captioned)[:, [171, 172, 338, 339]]
    assert (edges == 255).all()


def test_a_word_wider_than_its_image_is_cut():
    image = np.asarray(grid(flat(1), 1, ["w" * 200]))
    assert (image[:, :6] == 255).all()
    assert (image[:, -6:] == 255).all()
    assert (image < 60).any()


def test_before_is_above_after():
    sheet = np.asarray(before_after(flat(0.2, 0.4), flat(0.6, 0.8), ["one", "two"]))
    centres = {}
    for value in (51, 102, 153, 204):
        pixels = np.argwhere((sheet == value).all(axis=-1))
        assert len(pixels) >= 160 * 160
        centres[value] = np.median(pixels, axis=0)
    assert centres[51][1] == centres[153][1]
    assert centres[153][0] - centres[51][0] > 160
    assert centres[102][1] - centres[51][1] > 160  # the second pair is right of the first


def test_a_title_is_never_cut():
    titled = before_after(flat(0.5), flat(0.5), [""], "the largest gains of all, and how they were chosen")
    heading = titled.crop((0, 0, titled.width, 48))
    last_dark_column = np.flatnonzero((np.asarray(heading) < 60).any(axis=(0, 2))).max()
    assert 400 < last_dark_column < titled.width - 20


def test_rows_are_labelled_as_asked():
    plain, named = (before_after(flat(1), flat(1), [""], labels=labels) for labels in (("", ""), ("base", "tuned")))
    assert not len(dark_rows(plain, 0, 36))
    rows = dark_rows(named, 0, 36)
    assert rows.min() < 8 + 160 < rows.max()


def test_many_pairs_fill_bands_under_a_title():
    pairs = before_after(flat(*[0.5] * 8), flat(*[0.5] * 8), [""] * 8)
    more = before_after(flat(*[0.5] * 9), flat(*[0.5] * 9), [""] * 9)
    titled = before_after(flat(*[0.5] * 8), flat(*[0.5] * 8), [""] * 8, "evenly spread")
    assert more.size == (pairs.width, 2 * pairs.height)
    assert (titled.width, titled.height - pairs.height) == (pairs.width, 48)
    assert len(dark_rows(titled.crop((0, 0, titled.width, 48)), 0, titled.width)) > 10
    assert len(dark_rows(pairs, 0, 36)) > 40


def test_stack_puts_images_below_one_another():
    sheet = np.asarray(stack([grid(flat(0.2), 1), grid(flat(0.6, 0.6), 2)], gap=10))
    assert sheet.shape == (180 + 10 + 180, 344, 3)
    assert (sheet[8:168, 8:168] == 51).all()
    assert (sheet[198:358, 8:168] == 153).all()
    assert (sheet[:180, 176:] == 255).all()


def test_wrong_shapes():
    for images in (np.zeros((2, 2, 3)), np.zeros((1, 2, 2, 1)), np.zeros((0, 2, 2, 3))):
        with pytest.raises(ValueError, match="B, H, W, 3"):
            grid(images, 1)
    with pytest.raises(ValueError, match="zip"):
        grid(flat(0.5, 0.5), 1, ["only one"])


def test_uint8_images_are_shown_as_they_are():
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(grid(images, 2)), np.asarray(grid(images / 255, 2)))


def test_saves_a_png(tmp_path):
    image = grid(flat(0.5), 1)
    save_image(image, tmp_path / "new" / "image.png")
    with Image.open(tmp_path / "new" / "image.png") as found:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(image))
    with pytest.raises(UserError, match=r"cannot write .*image.png/below.png"):
        save_image(image, tmp_path / "new" / "image.png" / "below.png")
