"""Prompts to images, a batch at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.evaluation.sampler import Sampler, pixels
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.flow.solver import DpmSolver2M, solve
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.rl.transitions import initial_noise, prompt_keys
from tests import toy

PROMPTS = ["a", "tree", "a green sea", "abc", "eel"]


@pytest.fixture
def mesh():
    with jax.set_mesh(make_mesh(MeshConfig())):
        yield


def sample(pipeline, batch, prompts=PROMPTS, first=0):
    """All images, and the places of the batches."""
    params = pipeline.load(jax.sharding.get_mesh())
    sampler = Sampler(pipeline, shifted_times(4, 3.0), batch)
    places, parts = zip(*sampler(params, prompts, jax.random.key(1), first), strict=True)
    return np.concatenate(parts), list(places)


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("first", [0, 3])
def test_samples_do_not_depend_on_the_batch_or_the_start(first):
    whole, places = sample(toy.pipeline(None), 50)
    assert whole.shape == (5, 4, 4, 3)
    assert places == [0]
    part, places = sample(toy.pipeline(None), 2, PROMPTS[first:], first)
    assert places == list(range(first, 5, 2))
    np.testing.assert_allclose(part, whole[first:], atol=1e-6)
    assert np.abs(whole[0] - whole[1]).mean() > 0.01


@pytest.mark.usefixtures("mesh")
def test_images_of_the_second_order_solver():
    pipeline, times = toy.pipeline(None), shifted_times(6, 3.0)
    params, key = pipeline.load(jax.sharding.get_mesh()), jax.random.key(1)
    found = {}
    for solver in ("euler", "dpm2m"):
        ((_, found[solver]),) = Sampler(pipeline, times, 5, solver)(params, PROMPTS, key)
    noise = initial_noise(prompt_keys(key, 0, 5), pipeline.latents_shape)
    expected = solve(DpmSolver2M(6), pipeline.velocity, params, noise, times, pipeline.encode(PROMPTS))
    np.testing.assert_allclose(found["dpm2m"], pipeline.decode(params, expected), atol=1e-6)
    assert np.abs(found["dpm2m"] - found["euler"]).max() > 1e-3


def broken(value, letter):
    """The toy pipeline, whose images of prompts with `letter` are not finite."""
    column = " ae".index(letter)
    return dataclasses.replace(
        toy.pipeline(None),
        velocity=lambda params, latents, time, conditioning: (
            jnp.where(
                conditioning["text"][:, column:, None] > 0, value, toy.velocity(params, latents, time, conditioning)
            )
            if letter == "e"
            else jnp.full_like(latents, value)
        ),
        decode=lambda _, latents: latents.reshape(-1, 4, 4, 3),
    )


@pytest.mark.usefixtures("mesh")
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_is_not_finite_becomes_no_pixels(value):
    """The first prompt with a letter e is the second of all."""
    images, _ = sample(broken(value, "e"), 5)
    assert pixels(images[:1], PROMPTS[:1]).dtype == np.uint8
    with pytest.raises(UserError, match="the image of the prompt 'tree' is not finite"):
        pixels(images, PROMPTS)


@pytest.mark.usefixtures("mesh")
def test_a_batch_without_any_finite_image_is_an_error():
    with pytest.raises(UserError, match="the image of the prompt 'a' is not finite"):
        sample(broken(np.nan, " "), 2)
