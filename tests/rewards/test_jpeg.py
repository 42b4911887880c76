import io

import numpy as np
import pytest
from PIL import Image

from egrpo_jax.common.images import to_uint8
from egrpo_jax.rewards import load_reward


@pytest.fixture
def images():
    """Flat, smooth, noisy: ever harder to compress."""
    flat = np.full((48, 64, 3), 0.5)
    smooth = np.broadcast_to(np.linspace(0, 1, 64)[None, :, None], flat.shape)
    return np.stack([flat, smooth, np.random.default_rng(0).uniform(size=flat.shape)]).astype(np.float32)


def size_on_disk(image, path):
    Image.fromarray(to_uint8(image)).save(path, quality=95)
    return path.stat().st_size / 1000


def test_scores_are_the_sizes_of_files(images, tmp_path):
    sizes = np.array([size_on_disk(image, tmp_path / "x.jpg") for image in images], np.float32)
    assert sizes[0] < sizes[1] < sizes[2]
    prompts = ["a", "b", "c"]
    np.testing.assert_array_equal(load_reward("jpeg_incompressibility")(images, prompts).values, sizes)
    np.testing.assert_array_equal(load_reward("jpeg_compressibility")(images, prompts).values, -sizes)


def test_an_image_and_its_neighbours_do_not_matter_to_each_other(images):
    reward = load_reward("jpeg_incompressibility")
    np.testing.assert_array_equal(reward(images[::-1], "abc").values[::-1], reward(images, "xyz").values)


def test_the_file_shows_the_image(images):
    from egrpo_jax.rewards.jpeg import to_jpeg

    opened = Image.open(io.BytesIO(to_jpeg(to_uint8(images[1]))))
    assert opened.size == (64, 48)
    assert np.abs(np.asarray(opened) / 255 - images[1]).max() < 0.02


def test_a_prompt_too_few_is_refused(images):
    with pytest.raises(ValueError, match="2 prompts"):
        load_reward("jpeg_compressibility")(images, ["a", "b"])
