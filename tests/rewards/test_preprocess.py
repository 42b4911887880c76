"""Images as published scorers resize, crop and normalise them.

Against Pillow to the last bit, against PyTorch and open_clip (golden file), and against sums by hand.
"""

import jax
import numpy as np
import pytest
from PIL import Image

from egrpo_jax.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess, resize_matrix
from tests.oracle import open_clip, scored_images

SIZES = {  # of images, and the side of the square
    "square": (96, 96, 28),
    "wide": (40, 71, 28),
    "tall": (90, 47, 28),
    "odd leftover": (45, 30, 20),
    "enlarged": (13, 22, 40),
    "as it is": (28, 28, 28),
    "reduced by 16": (320, 322, 20),
}


def images(height, width, count=2, seed=0):
    """Noise, and squares of black and white, whose edges the filter overshoots at."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (count, height, width, 3), np.uint8)
    squares = 255 * rng.integers(0, 2, (count, height // 5 + 1, width // 5 + 1, 3), np.uint8)
    squares = squares.repeat(5, 1).repeat(5, 2)[:, :height, :width]
    return np.concatenate([noise, squares])


def in_levels(size, **options):
    """The pixels in 0 to 255, not normalised."""
    return jax.jit(Preprocess(size, mean=(0, 0, 0), std=(1 / 255,) * 3, **options))


def resized_by_pillow(image, width, height):
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("odd_crop", ["round", "floor"])
def test_pillow_to_the_last_bit(name, odd_crop):
    height, width, size = SIZES[name]
    given = images(height, width)
    short = min(height, width)
    expected = np.stack([resized_by_pillow(i, int(size * width / short), int(size * height / short)) for i in given])
    leftovers = [length - size for length in expected.shape[1:3]]
    top, left = (left // 2 if odd_crop == "floor" else round(left / 2) for left in leftovers)
    got = in_levels(size, odd_crop=odd_crop)(given / np.float32(255))
    np.testing.assert_allclose(got, expected[:, top : top + size, left : left + size], atol=1e-4)


@pytest.mark.parametrize(("kind", "arithmetic", "error"), [("hps", "torch", 1e-5), ("clip", "pillow", 2e-6)])
@pytest.mark.parametrize("size", scored_images.SIZES)
def test_published_pixels(kind, arithmetic, error, size):
    """HPSv2's transform, whose weights PyTorch rounds to float32, and open_clip's; a level is 0.015 of these units."""
    with np.load(open_clip.GOLDEN) as file:
        expected = file[f"pixels/{kind}_{size}"].transpose(0, 2, 3, 1)
    preprocess = jax.jit(Preprocess(expected.shape[1], arithmetic))
    np.testing.assert_allclose(preprocess(scored_images.images(size, 1) / np.float32(255)), expected, atol=error)


def test_the_two_crops_differ_where_the_leftover_is_odd():
    """43 x 20 pixels leave 23 rows out: above the square 12, which is 11.5 rounded to even, or 11."""
    given = images(43, 20) / np.float32(255)
    rounded, floored = (np.asarray(in_levels(20, odd_crop=kind)(given)) for kind in ("round", "floor"))
    np.testing.assert_array_equal(rounded[:, :-1], floored[:, 1:])
    assert (rounded[:, 0] != floored[:, 0]).any()


def test_squashed_images_keep_all_of_both_sides():
    given = images(40, 71)
    expected = np.stack([resized_by_pillow(image, 28, 28) for image in given])
    np.testing.assert_allclose(in_levels(28, fit="squash")(given / np.float32(255)), expected, atol=1e-4)


def test_floats_are_neither_rounded_nor_clipped_on_the_way():
    given = images(96, 96) / np.float32(255)
    floats, levels = (np.asarray(in_levels(28, arithmetic=kind)(given)) for kind in ("torch", "pillow"))
    assert floats.min() < -1
    assert floats.max() > 256
    assert np.abs(np.clip(floats, 0, 255) - levels).max() < 40  # clipped between rows and columns, too
    noise = slice(0, 2)
    assert 0.1 < np.abs(floats[noise] - levels[noise]).max() <= 1.1


def test_an_image_scores_as_the_file_it_is_saved_to():
    given = np.random.default_rng(0).uniform(-0.2, 1.2, (2, 30, 30, 3)).astype(np.float32)
    saved = np.rint(np.clip(given, 0, 1) * 255) / np.float32(255)
    for arithmetic in ("pillow", "torch"):
        apply = in_levels(20, arithmetic=arithmetic)
        np.testing.assert_array_equal(apply(given), apply(saved))


def test_normalised_by_channel():
    given = np.broadcast_to(np.float32([0, 0.4, 1]), (1, 40, 40, 3))
    expected = (np.array([0, 0.4, 1]) - CLIP_MEAN) / CLIP_STD
    np.testing.assert_allclose(Preprocess(20)(given), np.broadcast_to(expected, (1, 20, 20, 3)), atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("arithmetic", ["pillow", "torch"])
def test_an_image_that_is_not_finite_is_nan_and_no_other(arithmetic, value):
    given = images(40, 30) / np.float32(255)
    expected = np.array(Preprocess(20, arithmetic)(given))
    expected[1] = np.nan
    given[1, 3, 4, 0] = value
    np.testing.assert_array_equal(Preprocess(20, arithmetic)(given), expected)


def test_weights_by_hand():
    """Halved: distances of 1/4, 3/4, 5/4, 7/4 filter widths; at the border the weights left are scaled up to 1."""
    cubic = {0.25: 111, 0.75: 29, 1.25: -9, 1.75: -3}  # times 128
    row = np.array([cubic[d] for d in (1.75, 1.25, 0.75, 0.25, 0.25, 0.75, 1.25, 1.75)]) / 256
    matrix = resize_matrix(16, 8)
    np.testing.assert_allclose(matrix[4], np.concatenate([np.zeros(5), row, np.zeros(3)]), atol=1e-12)
    np.testing.assert_allclose(matrix[0, :5], row[3:] / row[3:].sum(), atol=1e-12)
    np.testing.assert_allclose(resize_matrix(5, 5), np.eye(5), atol=1e-12)
