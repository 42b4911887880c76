import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from egrpo_jax.common.errors import UserError
from egrpo_jax.rewards import load_reward
from egrpo_jax.rewards.ocr import OcrReward, edit_distance, wanted_text


def written(text, size=(320, 96)):
    """`text` in black on white, [H, W, 3] in [0, 1]."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).text(
        (size[0] / 2, size[1] / 2), text, fill="black", font=ImageFont.load_default(36), anchor="mm"
    )
    return np.asarray(image, np.float32) / 255


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("", "abc", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("abc", "cab", 2),
        ("same", "same", 0),
        ("sunday", "saturday", 3),
    ],
)
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == distance


@pytest.mark.parametrize(
    ("read", "score"),
    [
        ("New Hope", 1),
        ("NEWHOPE", 1),
        ("n e w\thope", 1),
        ("welcome to New Hope!", 1),  # beside other text
        ("New Hop", 1 - 1 / 7),
        ("Now Hape", 1 - 2 / 7),
        ("", 0),
        ("something else that is much longer", 0),  # never below
    ],
)
def test_what_was_read_is_compared_with_what_stands_in_quotes(read, score):
    reward = OcrReward(lambda _: read)
    scores = reward(np.zeros((1, 8, 8, 3)), ['A sign that says "New Hope" over "a door"'])
    np.testing.assert_allclose(scores, [score], rtol=1e-6)
    assert scores.dtype == np.float32


def test_each_image_is_read_for_its_own_prompt():
    images = np.zeros((3, 4, 5, 3), np.float32)
    images[:, 0, 0, 0] = [0, 1, 2]
    images /= 255

    def read(image):
        assert (image.shape, image.dtype) == ((4, 5, 3), np.uint8)
        return "abc"[image[0, 0, 0]]

    np.testing.assert_array_equal(OcrReward(read)(images, ['"a"', '"x"', '"c"']), [1, 0, 1])


@pytest.mark.parametrize("prompt", ['say "Hi There"', "say “Hi There”", '"hithere" and "no"', '"Hi\nThere"'])
def test_the_text_in_quotes(prompt):
    assert wanted_text(prompt) == "hithere"


@pytest.mark.parametrize("prompt", ["a red sign", 'a "sign', 'an empty "" sign', 'a blank " " sign', "it's 'single'"])
def test_a_prompt_without_quotes_is_named(prompt):
    with pytest.raises(UserError) as caught:
        OcrReward(lambda _: "")(np.zeros((2, 8, 8, 3)), ['"fine"', prompt])
    assert repr(prompt) in str(caught.value)


def test_a_reader_that_fails_is_not_a_score_of_zero():
    def fails(_):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError):
        OcrReward(fails)(np.zeros((1, 8, 8, 3)), ['"text"'])


def test_without_rapidocr_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"pip install 'egrpo_jax\[ocr\]'"):
        load_reward("ocr")


def test_rendered_text_is_read():
    pytest.importorskip("rapidocr")
    shown = ["HELLO", "cat 42", "New Hope", "HELLO", ""]
    prompts = [f'a sign that says "{text}"' for text in ("HELLO", "cat 42", "New Hope", "HALLO", "HELLO")]
    images = np.stack([written(text) for text in shown])
    reward = load_reward("ocr")
    scores = reward(images, prompts)
    np.testing.assert_allclose(scores.values, [1, 1, 1, 0.8, 0], atol=1e-6)
    np.testing.assert_array_equal(reward(images, prompts), scores)


def test_rapidocr_gets_blue_first_and_its_lines_are_joined(monkeypatch):
    seen, lines = [], iter([("New", "Hope"), None])

    class Engine:
        def __init__(self, params):
            seen.append(params)

        def __call__(self, image):
            seen.append(image)
            return SimpleNamespace(txts=next(lines))

    monkeypatch.setitem(sys.modules, "rapidocr", SimpleNamespace(RapidOCR=Engine))
    images = np.zeros((2, 8, 8, 3), np.float32)
    images[..., 0] = 1
    np.testing.assert_array_equal(load_reward("ocr")(images, ['"new hope"'] * 2).values, [1, 0])
    params, *images = seen
    assert params["Det.limit_type"] == "max"
    for image in images:
        assert image.flags.c_contiguous
        np.testing.assert_array_equal(image[0, 0], [0, 0, 255])
