"""ImageReward from a file laid out as the published one, against the published code (golden file)."""

import functools
import json

import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.rewards.config import ImageRewardConfig, ScorersConfig
from egrpo_jax.rewards.imagereward import imagereward
from egrpo_jax.rewards.registry import load_reward
from tests.models.test_blip import golden
from tests.oracle.imagereward import CASES, PROMPTS, SIZES, images, write_vocabulary
from tests.oracle.random_weights import random_tensors
from tests.torch_files import write_checkpoint

BUFFER = "blip.text_encoder.embeddings.position_ids"


def published_tensors(name):
    """Every tensor of the published state dict, those that no score needs too."""
    shapes = json.loads(str(golden(name)["shapes"]))
    numbers = np.arange(shapes.pop(BUFFER)[1])[None]
    return random_tensors(shapes) | {BUFFER: numbers}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each case, with the two files."""
    made = {}
    for name in CASES:
        made[name] = tmp_path_factory.mktemp(name)
        write_checkpoint(made[name] / "ImageReward.pt", published_tensors(name), root="ImageReward")
        write_vocabulary(made[name] / "vocab.txt")
    return made


def scorers(folder, **changes):
    return ScorersConfig(imagereward=ImageRewardConfig(str(folder), str(folder)), **changes)


@pytest.fixture(scope="module")
def reward_of(folders):
    """The reward of a case."""
    mesh = make_mesh(MeshConfig())
    return functools.cache(lambda name: imagereward(scorers(folders[name], batch=2), mesh, CASES[name].config))


def test_one_that_rests_on_the_host_gives_the_same_scores(folders, reward_of):
    name = next(iter(CASES))
    resting = imagereward(scorers(folders[name], batch=2, offload=True), make_mesh(MeshConfig()), CASES[name].config)
    given = np.stack([in_unit_range(image) for image in images() if image.shape == images()[0].shape])
    asked = ["a cat"] * len(given)
    np.testing.assert_array_equal(resting(given, asked), reward_of(name)(given, asked))


def in_unit_range(image):
    return (image / 255).astype(np.float32)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_parity_from_pixels_and_prompt_to_score(reward_of, size):
    """Square, wide, tall and odd: every image of a size, which has a prompt of its own."""
    rows = [row for row, image in enumerate(images()) if image.shape[:2] == size]
    assert rows
    batch = np.stack([in_unit_range(images()[row]) for row in rows])
    scores = reward_of("patch_32")(batch, [PROMPTS[row] for row in rows])
    np.testing.assert_allclose(scores, golden("patch_32")["scores"][rows], rtol=0, atol=1e-5)


def test_parity_of_the_other_sizes(reward_of):
    scores = reward_of("patch_16")(in_unit_range(images()[0])[None], PROMPTS[:1])
    np.testing.assert_allclose(scores, golden("patch_16")["scores"][:1], rtol=0, atol=1e-5)


def test_a_group_of_images_of_one_prompt_and_none_of_another(reward_of):
    """Each image's score is its own, whatever stands beside it; one that is nan has none."""
    batch = np.stack([in_unit_range(image) for image in images() if image.shape == (224, 224, 3)])
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[3]]
    scores = np.asarray(reward_of("patch_32")(batch, prompts))
    reversed_scores = reward_of("patch_32")(batch[::-1], prompts[::-1])
    np.testing.assert_allclose(reversed_scores[::-1], scores, atol=1e-6)
    assert len(np.unique(scores.round(3))) == 3
    batch[1, 5, 7] = np.nan
    np.testing.assert_array_equal(np.isnan(reward_of("patch_32")(batch, prompts)), [False, True, False])


def test_images_and_prompts_must_be_as_many(reward_of):
    with pytest.raises(AssertionError):
        reward_of("patch_32")(np.zeros((2, 9, 9, 3), np.float32), ["x"])


def test_files_that_are_not_the_published_ones(folders, tmp_path):
    with pytest.raises(
        UserError, match=r"vocab\.txt has 136 tokens; give the vocab\.txt of bert-base-uncased, with 305"
    ):
        load_reward("imagereward", scorers(folders["patch_32"]))
    with pytest.raises(UserError, match=r"ImageReward\.pt does not hold the model that was asked for: of its"):
        imagereward(scorers(folders["patch_16"]), make_mesh(MeshConfig()), CASES["patch_32"].config)
    write_vocabulary(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match=r"^cannot read \S+ImageReward\.pt: No such file or directory$"):
        imagereward(scorers(tmp_path), make_mesh(MeshConfig()), CASES["patch_32"].config)
