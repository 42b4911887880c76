import jax
import numpy as np
import pytest

from egrpo_jax.models.patches import latents_to_pixels, patchify, pixels_to_latents, unpatchify


def test_tokens_are_row_major_patches():
    images = np.arange(2 * 4 * 6 * 1).reshape(2, 4, 6, 1)
    tokens = patchify(images, 2)
    assert tokens.shape == (2, 6, 4)
    np.testing.assert_array_equal(tokens[0, 0], [0, 1, 6, 7])
    np.testing.assert_array_equal(tokens[0, 1], [2, 3, 8, 9])
    np.testing.assert_array_equal(tokens[0, 3], [12, 13, 18, 19])


def test_unpatchify_is_the_inverse():
    images = jax.random.normal(jax.random.key(0), (3, 8, 12, 3))
    np.testing.assert_array_equal(unpatchify(patchify(images, 4), (2, 3), 4), images)


def test_pixels_come_back_and_are_clipped():
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3))
    latents = pixels_to_latents(images, 4)
    assert latents.min() >= -1
    assert latents.max() <= 1
    np.testing.assert_allclose(latents_to_pixels(latents, (2, 2), 4), images, atol=1e-6)
    assert latents_to_pixels(latents * 10, (2, 2), 4).max() == 1


def test_patch_must_divide_the_image():
    with pytest.raises(ValueError, match="divide"):
        patchify(np.zeros((1, 9, 8, 3)), 4)
    with pytest.raises(AssertionError):
        unpatchify(np.zeros((1, 5, 48)), (2, 2), 4)
