"""Prompts to images, a batch at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.images import to_uint8
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from tests import toy

PROMPTS = ["a", "tree", "a green sea", "abc", "eel"]


@pytest.fixture
def mesh():
    with jax.set_mesh(make_mesh(MeshConfig())):
        yield


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("first", [0, 3])
def test_batches_are_the_images_in_8_bits(first):
    pipeline, key = toy.pipeline(None), jax.random.key(1)
    sampler = Sampler(pipeline, shifted_times(4, 3.0), 2)
    whole = to_uint8(sampler(pipeline.params, PROMPTS, key))
    parts = list(sampler.batches(pipeline.params, PROMPTS[first:], key, first))
    assert [place for place, _ in parts] == list(range(first, 5, 2))
    assert {images.dtype for _, images in parts} == {np.dtype(np.uint8)}
    np.testing.assert_array_equal(np.concatenate([images for _, images in parts]), whole[first:])


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_not_finite_is_an_error_with_its_prompt(value):
    """The first prompt with a letter e is the second of all; the first batch comes whole."""
    pipeline = dataclasses.replace(
        toy.pipeline(None),
        velocity=lambda params, latents, time, conditioning: jnp.where(
            conditioning["text"][:, 2:, None] > 0, value, toy.velocity(params, latents, time, conditioning)
        ),
        decode=lambda _, latents: latents.reshape(-1, 4, 4, 3),
    )
    batches = Sampler(pipeline, shifted_times(4, 3.0), 1).batches(pipeline.params, PROMPTS, jax.random.key(1))
    assert next(batches)[0] == 0
    with pytest.raises(UserError, match="the image of the prompt 'tree' is not finite"):
        next(batches)
