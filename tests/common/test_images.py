import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.common.images import MAGENTA, finite_images, to_display, to_uint8


def test_uint8_rounds_and_clips():
    values = np.array([-1, 0, 0.4 / 255, 0.6 / 255, 0.5, 1, 2])
    np.testing.assert_array_equal(to_uint8(values), [0, 0, 0, 1, 128, 255, 255])
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(every / 255), every)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_becomes_no_pixel(value):
    images = np.full((2, 3, 4, 3), 0.5)
    images[1, 2, 3, 0] = value
    with pytest.raises(ValueError, match=r"expected finite pixels, found nan or infinity in images \(2, 3, 4, 3\)"):
        to_uint8(images)
    shown = to_display(images)
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown[0], 128)
    np.testing.assert_array_equal(shown[1], np.broadcast_to(MAGENTA, (3, 4, 3)))


@pytest.mark.parametrize("finite", [finite_images, jax.jit(finite_images)], ids=["plain", "jit"])
def test_finite_images(finite):
    images = np.full((4, 3, 4, 3), 0.5, np.float32)
    images[1, 0, 0, 0], images[2], images[3, 2, 3, 2] = np.nan, np.inf, -np.inf
    for batch in (images, jnp.asarray(images)):
        np.testing.assert_array_equal(finite(batch), [True, False, False, False])
    assert isinstance(finite_images(images), np.ndarray)
