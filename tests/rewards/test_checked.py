"""Whatever a reward gives: scores, a mask where none came, or one line that names it."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.rewards import CheckedReward, RewardError, Scores, load_reward
from egrpo_jax.rewards.registry import BUILT_IN
from tests.rewards import own

SIZE = (24, 40)
PROMPTS = ["a", "b", "c", "d", "e"]


@pytest.fixture
def images():
    levels = np.arange(1, 6, dtype=np.float32)[:, None, None, None] / 8
    return np.broadcast_to(levels, (5, *SIZE, 3)).copy()


def load(name):
    return load_reward(f"tests.rewards.own:{name}")


MEANS = [0.125, 0.25, 0.375, 0.5, 0.625]
PARTLY = [None, 0.25, 0.375, None, 0.625]
GIVEN = {  # what is taken, and the scores it stands for
    **dict.fromkeys(("brightness", "python_list", "numpy_list", "column", "float64", "bfloat16"), MEANS),
    **dict.fromkeys(("torch", "torch_list", "background", "Made"), MEANS),
    "ints": [0, 1, 2, 3, 4],
    "bools": [0, 0, 0, 0, 1],
    "nan_always": [None] * 5,
    **dict.fromkeys(("inf_some", "none_some", "huge", "no_square"), PARTLY),
}


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("name", GIVEN)
def test_what_is_unambiguous_becomes_scores(name, as_array, images):
    reward = load(name)
    reward.require(PROMPTS, SIZE)
    scores = reward(as_array(images), PROMPTS)
    came = np.array([value is not None for value in GIVEN[name]])
    assert (scores.values.dtype, scores.came.dtype) == (np.float32, bool)
    np.testing.assert_array_equal(scores.came, came)
    np.testing.assert_array_equal(scores.values, [value or 0 for value in GIVEN[name]])
    np.testing.assert_array_equal(np.isnan(scores.with_nan()), ~came)
    np.testing.assert_array_equal(scores.with_nan()[came], scores.values[came])


NUMBERS = "expected an array [2] or a list of numbers, one for each image"
RIGHT = "it must be a function (images, prompts) -> scores, or a class of such, made without arguments"
WRONG = {  # the line, after "the reward '...' "
    "scalar": f"gave 0.5, {NUMBERS}",
    "short": f"gave an array (1,) of float32, {NUMBERS}",
    "short_list": f"gave a list of 1, [0.5], {NUMBERS}",
    "row": f"gave an array (1, 2) of float32, {NUMBERS}",
    "ragged": f"gave a list of 2, [[0.5], [0.5, 0.5]], {NUMBERS}",
    "none": f"gave None, {NUMBERS}",
    "strings": f"gave a list of 2, ['a', 'a'], {NUMBERS}",
    "objects": f"gave an array (2,) of object, {NUMBERS}",
    "complex_numbers": f"gave an array (2,) of complex128, {NUMBERS}",
    "mapping": f"gave {{'scores': [0.5, 0.5]}}, {NUMBERS}",
    "lazy": f"gave <...>, {NUMBERS}",
    "raises": "raised RuntimeError: boom over two lines (own.py, line LINE)",
    "raises_in_numpy": "raised ValueError: cannot reshape array of size 5760 into shape (7,) (own.py, line LINE)",
    "raises_waiting": "raised OSError: gone (own.py, line LINE)",
    "numpy_only": "raised TypeError: expected np.ndarray (got ArrayImpl) (own.py, line LINE)",
    "one_arg": f"takes (images); {RIGHT}",
    "NeedsArgs": f"is made with (x); {RIGHT}",
    "Boom": "raised FileNotFoundError: model.bin (own.py, line LINE)",
    "NotAReward": f"is <...>; {RIGHT}",
    "not_callable": f"is 3; {RIGHT}",
}
LINES = {  # of own.py, by their text
    "raises": 'raise RuntimeError("boom',
    "raises_in_numpy": "return np.reshape",
    "raises_waiting": 'raise OSError("gone")',
    "numpy_only": "raise TypeError",
    "Boom": "raise FileNotFoundError",
}


def line_of(name):
    text = Path(own.__file__).read_text().splitlines()
    return next(str(number) for number, line in enumerate(text, 1) if LINES[name] in line)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_none_is_one_line_at_the_start(name):
    """Found by a try on two grey images, before any image of a model is there."""
    expected = WRONG[name].replace("LINE", line_of(name) if name in LINES else "")
    with pytest.raises(UserError) as caught:
        load(name).require(PROMPTS, SIZE)
    found = str(caught.value)
    assert "\n" not in found
    assert re.sub("<[^>]*>", "<...>", found) == f"the reward 'tests.rewards.own:{name}' {expected}"


def test_an_interrupt_is_nobodys_mistake():
    with pytest.raises(KeyboardInterrupt):
        load("keyint").require(PROMPTS, SIZE)


def test_a_reward_that_raises_later_is_named(images):
    calls = []

    def late(images, prompts):
        calls.append((type(images), images.shape, prompts))
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return images.mean((1, 2, 3))

    reward = CheckedReward("mine:late", late, own=True)
    reward.require(["one"], SIZE)
    assert [(shape, prompts) for _, shape, prompts in calls] == [((2, *SIZE, 3), ["one", "one"])] * 2
    assert calls[0][0] is np.ndarray
    assert issubclass(calls[1][0], jax.Array)
    expected = r"^the reward 'mine:late' raised RuntimeError: out of memory \(test_checked.py, line \d+\)$"
    with pytest.raises(RewardError, match=expected) as caught:
        reward(images, PROMPTS)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_what_fails_while_its_scores_are_waited_for_is_named(images):
    with pytest.raises(RewardError, match="raised OSError: gone"):
        load("raises_waiting").start(images, PROMPTS)()


def test_a_mistake_of_the_library_keeps_its_traceback(images):
    with pytest.raises(RuntimeError, match="boom"):
        CheckedReward("built_in", own.raises)(images, PROMPTS)


@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_images_that_are_not_finite_are_not_scored(value, as_array, images):
    seen = []

    def score(images, prompts):
        seen.append((np.asarray(images), prompts))
        return np.asarray(images).mean((1, 2, 3))

    reward = CheckedReward("mine", score)
    images[1, 3, 5, 0] = images[4] = value
    scores = reward(as_array(images), PROMPTS)
    np.testing.assert_array_equal(scores.came, [True, False, True, True, False])
    np.testing.assert_array_equal(scores.values, [0.125, 0, 0.375, 0.5, 0])
    ((shown, prompts),) = seen
    np.testing.assert_array_equal(shown, images[[0, 2, 3]])
    assert prompts == ["a", "c", "d"]
    scores = reward(as_array(images[[1, 4]]), ["b", "e"])
    np.testing.assert_array_equal(scores.came, [False, False])
    assert len(seen) == 1


def test_finite_images_are_handed_on_as_they_are(images):
    seen = []
    reward = CheckedReward("mine", lambda *inputs: seen.append(inputs) or [0.5] * 5)
    for batch in (images, jnp.asarray(images)):
        assert reward(batch, PROMPTS).came.all()
        assert seen[-1][0] is batch
        assert seen[-1][1] is PROMPTS


@pytest.mark.parametrize(
    "name", ["jpeg_compressibility", "jpeg_incompressibility", *(name for name in BUILT_IN if name.startswith("emoji"))]
)
def test_no_built_in_reward_scores_an_image_that_is_none(name):
    """R@1 and R@10 gave it 1.0, and JPEG the best size of all."""
    images = np.full((2, 32, 32, 3), 0.5, np.float32)
    images[1] = np.nan
    np.testing.assert_array_equal(load_reward(name)(images, ["cat", "dog"]).came, [True, False])


def test_scores_of_another_reward_are_scores(images):
    inner = load("inf_some")
    scores = CheckedReward("outer", inner)(images, PROMPTS)
    np.testing.assert_array_equal(scores.came, [False, True, True, False, True])
    chex.assert_trees_all_equal(scores, inner(images, PROMPTS))


def test_the_mean_is_of_the_scores_that_came():
    assert Scores.of([1.0, np.nan, 2.0]).mean() == 1.5
    assert np.isnan(Scores.of([np.inf]).mean())


def test_what_a_reward_requires_is_asked_with_its_name():
    class Picky:
        def __call__(self, *_):
            return [0.0, 0.0]

        def require(self, prompts, size):
            raise UserError(f"expected something else than {prompts} of {size}")

    with pytest.raises(UserError, match=r"^the reward 'mine:Picky': expected something else than \['a'\] of \(2, 3\)$"):
        CheckedReward("mine:Picky", Picky(), own=True).require(["a"], (2, 3))


NAMES = "expected names of emoji as prompts, which it ranks"
QUOTES = "expected prompts with the text to render in double quotes"
REQUIRED = {  # size and prompts that do not fit, and the line
    "ocr": ((8, 8), ['"fine"', "a sign", 'a "sign'], f"{QUOTES}; 2 of 3 have none, the first is 'a sign'"),
    "emoji_judge_r1": ((32, 32), ["cat", "green cat"], f"{NAMES}; 1 of 2 are none, the first is 'green cat'"),
    "emoji_judge_r10": ((32, 32), ["zqx"], f"{NAMES}; 1 of 1 are none, the first is 'zqx'"),
    "emoji": ((32, 48), ["anything"], "expected images of 32 x 32 pixels, found 32 x 48"),
}


@pytest.mark.parametrize("name", REQUIRED)
def test_prompts_and_sizes_that_do_not_fit_are_found_before_scoring(name, monkeypatch):
    monkeypatch.setattr("egrpo_jax.rewards.ocr._rapidocr", lambda: None)
    size, prompts, line = REQUIRED[name]
    with pytest.raises(UserError) as caught:
        load_reward(name).require(prompts, size)
    assert str(caught.value) == f"the reward {name!r}: {line}"


@pytest.mark.parametrize("found", [np.zeros((2, 4, 4)), np.zeros((2, 4, 4, 4)), np.zeros((3, 4, 4, 3))])
def test_wrong_shapes_are_the_callers_mistake(found):
    with pytest.raises(ValueError, match="2 prompts need images"):
        load("brightness")(found, ["a", "b"])


def test_features_are_those_of_the_reward():
    features = load_reward("emoji").encode_images(np.full((1, 32, 32, 3), 0.5, np.float32))
    np.testing.assert_allclose(np.linalg.norm(features, axis=-1), 1, atol=1e-5)
    assert load("brightness").encode_images is None
