"""A vision model as the judge: what it is asked, and how its words become a score."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.rewards.config import RemoteConfig
from egrpo_jax.rewards.remote.chat import Chat
from egrpo_jax.rewards.remote.client import remote
from egrpo_jax.rewards.remote.post import Fault
from tests.fault_server import FaultServer, chats, numbered, right, says


def make(url="http://127.0.0.1:1", **changes):
    quick = {"api": "chat", "timeout": 30.0, "deadline": 30.0, "retries": 1, "backoff": 0.01}
    return RemoteConfig(url, **quick | changes)


def score(text, **changes):
    return Chat(make(**changes)).scores({"choices": [{"message": {"content": text}}]}, 1)[0]


@pytest.mark.parametrize("base", ["", "/", "/v1", "/v1/"])
def test_the_request_is_a_chat_completion(base):
    with FaultServer(chats("Final Score: 4")) as server:
        images, prompts = numbered(1, height=40, width=56)
        scores = remote("judge", make(server.url + base, model="Judge", max_tokens=77))(images, prompts)
        assert server.paths == ["/v1/chat/completions"]
        (request,) = server.requests
    np.testing.assert_allclose(scores, [0.8])
    assert {key: request[key] for key in ("model", "temperature", "max_tokens")} == {
        "model": "Judge",
        "temperature": 0,
        "max_tokens": 77,
    }
    (message,) = request["messages"]
    image, text = message["content"]
    assert message["role"] == "user"
    assert (image["type"], text["type"]) == ("image_url", "text")
    assert "prompt 0" in text["text"]
    assert "{prompt}" not in text["text"]
    assert "Final Score: x" in text["text"]
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    sent = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (sent.format, sent.size) == ("JPEG", (56, 40))


def test_a_token_in_the_address_stays_behind_the_path():
    assert Chat(make("http://a/v1/?token=x")).url == "http://a/v1/chat/completions?token=x"


def test_an_image_is_sent_in_its_colours():
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[..., 0] = 200
    url = Chat(make()).request(image, ["red"])["messages"][0]["content"][0]["image_url"]["url"]
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))), np.int32)
    assert np.abs(sent - image[0]).max() <= 3


def test_each_image_is_judged_by_itself():
    with FaultServer(chats("Final Score: 2.#")) as server:
        reward = remote("judge", make(server.url, concurrency=4))
        np.testing.assert_allclose(reward(*numbered(9)), (2 + np.arange(9) / 10) / 5, rtol=1e-6)
        assert len(server.requests) == 9
        assert server.most_at_once <= 4


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("Final Score: 4", 4),
        ("The cat is blue.\n\nFinal Score: 3.75.", 3.75),
        ("**Final Score:** 5", 5),
        ("**Final Score**: [2]", 2),
        ("Final Score:\n5.0", 5),
        ("Final Score: 4/5", 4),
        ("You want 'Final Score: 1' at the end.\nFinal Score: 3", 3),
    ],
)
def test_a_single_mark_is_read(text, mark):
    assert score(text) == pytest.approx(mark / 5)


@pytest.mark.parametrize("text", ["", "4", "Final Score: x", "Final Score: 0", "Final Score: 45", "Final Score: 5.5"])
def test_what_is_no_mark_is_no_score(text):
    with pytest.raises(Fault, match="no mark") as caught:
        score(text)
    assert not caught.value.retry


AXES = "Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\nStyle Score (1-5): 2"


@pytest.mark.parametrize(
    "text",
    [AXES, "\n".join(reversed(AXES.splitlines())), f"I see a dog.\n{AXES}\nThat is all.", AXES.replace(":", ":\n")],
)
def test_three_marks_are_averaged(text):
    assert score(text, template="axes") == pytest.approx((4 + 3.5 + 2) / 15)


def test_two_marks_of_three_are_no_score():
    with pytest.raises(Fault, match="no mark"):
        score(AXES.replace("Style", "Taste"), template="axes")


def test_an_own_template_and_patterns(tmp_path):
    path = tmp_path / "question.txt"
    path.write_text('How good is this image of "{prompt}"? {"hands": 0 to 10, "face": 0 to 10}')
    own = {"template": str(path), "patterns": (r'"hands": (\d+), "face": (\d+)', r"total (-?[\d.]+)"), "best": 10.0}
    assert score('{"hands": 9, "face": 3} total 6', **own) == pytest.approx(0.6)
    assert score('{"hands": 9, "face": 3} total -6', **own) == pytest.approx(0.2)
    text = Chat(make(**own)).request(np.zeros((1, 4, 4, 3), np.uint8), ["a {prompt}"])["messages"][0]["content"][1]
    assert text["text"].startswith('How good is this image of "a {prompt}"? {"hands"')
    with pytest.raises(Fault, match="no mark"):
        score("total 1.2.3", **own | {"patterns": (r"total ([\d.]+)",)})
    with pytest.raises(Fault, match="no mark"):
        score("none", **own | {"patterns": (r"none|(\d)",)})


def test_own_patterns_for_a_built_in_template():
    assert score("Final Score: 3\nConfidence: 5", patterns=(r"Confidence: (\d)",)) == 1


@pytest.mark.parametrize(
    "answer",
    [{}, [], "text", {"choices": []}, {"choices": [{"message": {"content": None}}]}, {"choices": {"0": 1}}, None],
)
def test_what_is_no_completion_is_a_wrong_answer(answer):
    with pytest.raises(Fault, match="wrong answer") as caught:
        Chat(make()).scores(answer, 1)
    assert caught.value.retry


def test_an_image_without_a_mark_is_missing_and_counted_not_zero(capsys):
    def sometimes(handler, request):
        text = request["messages"][0]["content"][1]["text"]
        (chats("I cannot judge this.") if "prompt 1" in text else chats("Final Score: 1.#"))(handler, request)

    with FaultServer(sometimes) as server:
        reward = remote("judge", make(server.url))
        np.testing.assert_allclose(reward(*numbered(3)), [0.2, np.nan, 0.24], rtol=1e-6)
        assert len(server.requests) == 3
    assert reward.faults == {"no mark": 1, "missing": 1}
    assert "'I cannot judge this.'" in capsys.readouterr().err


def test_faults_of_the_server_are_tried_again():
    with FaultServer(says(b"", 503), right, chats("Final Score: 5")) as server:
        reward = remote("judge", make(server.url, retries=2))
        np.testing.assert_array_equal(reward(*numbered(1)), [1])
    assert reward.faults == {"HTTP 503": 1, "wrong answer": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "no_such.txt"}, "template: found 'no_such.txt', expected pointwise, axes or a text file"),
        ({"template": "{empty}"}, r"template: found '.*', expected a file with \{prompt\} in it"),
        ({"template": "{own}"}, r"patterns: found \(\), expected regular expressions with a group"),
        ({"patterns": ("Score: .",)}, "patterns: found .*, expected regular expressions with a group"),
        ({"patterns": ("Score: (.",)}, "patterns: found .*, expected regular expressions .*unterminated"),
    ],
)
def test_a_wrong_question_is_named_before_anything_is_sent(changes, message, tmp_path):
    (tmp_path / "empty").write_text("How good is it?")
    (tmp_path / "own").write_text("How good is this {prompt}?")
    if "template" in changes and "{" in changes["template"]:
        changes = {"template": str(tmp_path / changes["template"].strip("{}"))}
    with pytest.raises(ConfigError, match=rf"config\.{message}"):
        remote("judge", make(**changes))
