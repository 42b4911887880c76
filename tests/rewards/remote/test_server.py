"""A reward on another machine, and one here that takes its scores from there."""

import base64
import contextlib
import http.client
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from egrpo_jax.common.errors import UserError
from egrpo_jax.rewards import CheckedReward
from egrpo_jax.rewards.config import RemoteConfig
from egrpo_jax.rewards.remote import server as serve
from egrpo_jax.rewards.remote.client import remote
from egrpo_jax.rewards.remote.scores import read_request
from tests.fault_server import numbered


def brightness(images, prompts):
    """Of an image and its own prompt alone."""
    return images.mean((1, 2, 3)) + np.array([len(prompt) for prompt in prompts])


@contextlib.contextmanager
def serving(reward):
    checked = reward if isinstance(reward, CheckedReward) else CheckedReward("mine", reward)
    server = serve.ScoreServer("mine", checked, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(30)
        assert not thread.is_alive()


def client(server, **changes):
    quick = {"timeout": 30.0, "deadline": 30.0, "retries": 0, "batch": 4}
    return remote("mine", RemoteConfig(f"http://127.0.0.1:{server.port}", **quick | changes))


def send(server, body, path="/"):
    """Status and JSON of the answer, or its text if it is none."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", body)
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        text = answer.read().decode()
        return answer.status, json.loads(text) if answer.headers["Content-Type"] == "application/json" else text


def connect(server, sent=b""):
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(sent)
    return connection


def png(image, mode="RGB"):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, format="PNG")
    return file.getvalue()


def body(*files, prompts=None):
    texts = [base64.b64encode(file).decode() for file in files]
    return json.dumps({"images": texts, "prompts": ["p"] * len(files) if prompts is None else prompts}).encode()


GRAY = np.full((4, 4, 3), 128, np.uint8)


def test_scores_from_there_are_those_from_here():
    rng = np.random.default_rng(0)
    images = np.rint(rng.uniform(size=(11, 20, 12, 3)) * 255).astype(np.float32) / 255
    prompts = ["ä" * (index % 3) for index in range(11)]
    with serving(brightness) as server:
        scores = client(server)(images, prompts)
    np.testing.assert_array_equal(scores, brightness(images, prompts).astype(np.float32))


def test_it_scores_one_request_at_a_time():
    busy = threading.Lock()

    def alone(images, prompts):
        assert busy.acquire(blocking=False)
        time.sleep(0.005)
        busy.release()
        return np.arange(len(prompts)) + images[0, 0, 0, 0] * 255

    with serving(alone) as server:
        np.testing.assert_allclose(client(server, concurrency=8)(*numbered(40)), np.arange(40), atol=1e-4)


def test_it_says_who_it_is():
    with serving(brightness) as server:
        assert send(server, None) == (200, {"reward": "mine"})


def test_what_is_no_number_is_no_score():
    with serving(lambda *_: np.array([1.5, np.nan, np.inf])) as server:
        assert send(server, body(png(GRAY), png(GRAY), png(GRAY))) == (200, {"scores": [1.5, None, None]})
        np.testing.assert_array_equal(client(server)(*numbered(3)), [1.5, np.nan, np.nan])


BAD = {
    "two lists": [b"[]", b'{"images": 3, "prompts": []}', body(), body(png(GRAY), prompts=["a", "b"])],
    "prompts: expected texts": [body(png(GRAY), prompts=[3])],
    "each a PNG in base64": [json.dumps({"images": [3], "prompts": ["a"]}).encode()],
    "PNG files in base64": [json.dumps({"images": ["!"], "prompts": ["a"]}).encode(), body(b"GIF89a")],
    "mode RGB, found RGBA": [body(png(GRAY, "RGBA"))],
    "one size": [body(png(GRAY), png(GRAY[:2]))],
    "damaged": [body(png(GRAY)[:50])],
    "Expecting value": [b"no json"],
    "recursion": [b"[" * 100_000],
    "decode": [b'"\xff"'],
}


@pytest.mark.parametrize("message", BAD)
def test_a_bad_request_is_refused_in_a_line(message):
    with serving(brightness) as server:
        for request in BAD[message]:
            status, answer = send(server, request)
            assert status == 400
            assert message in answer["error"]
            assert "\n" not in answer["error"]
        assert send(server, body(png(GRAY)))[0] == 200


def test_images_too_large_together_are_refused(monkeypatch):
    monkeypatch.setattr("egrpo_jax.rewards.remote.scores.MOST_PIXELS", 40)
    with serving(brightness) as server:
        assert send(server, body(png(GRAY), png(GRAY)))[0] == 200
        status, answer = send(server, body(png(GRAY), png(GRAY), png(GRAY)))
    assert status == 400
    assert "at most 40 pixels" in answer["error"]


def test_a_request_too_long_is_refused_unread(monkeypatch):
    monkeypatch.setattr(serve, "LONGEST_REQUEST", 1000)
    with serving(brightness) as server:
        status, text = send(server, b"x" * 1000)
        assert status == 413
        assert "exceeds max_body of 1000" in text
        reward = client(server, retries=3)
        noise = np.random.default_rng(0).uniform(size=(4, 1024, 1024, 3))  # refused before all of it is sent
        assert np.isnan(reward(noise, ["p"] * 4)).all()
    assert reward.faults == {"HTTP 413": 1, "missing": 4}


def test_another_path_and_a_missing_length_are_refused():
    with serving(brightness) as server:
        assert send(server, b"{}", path="/v1/score")[0] == 404
        assert send(server, b"{}", path="/%1b[2J")[1] == {"error": "expected POST to /, found POST '/\\x1b[2J'"}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.putrequest("POST", "/")
        connection.endheaders()
        assert connection.getresponse().status == 411
        connection.close()


def test_what_the_reward_cannot_use_is_the_clients_fault(capsys):
    def picky(_, prompts):
        raise UserError(f"no text in quotes in {prompts[0]!r}")

    with serving(picky) as server:
        reward = client(server)
        assert np.isnan(reward(*numbered(2))).all()
    assert reward.faults == {"HTTP 400": 1, "missing": 2}
    assert "no text in quotes in 'prompt 0'" in capsys.readouterr().err


def test_a_reward_that_fails_once_goes_on(capsys):
    scores = iter([RuntimeError("out of\nmemory"), np.array([7.0])])

    def sometimes(*_):
        result = next(scores)
        if isinstance(result, Exception):
            raise result
        return result

    with serving(sometimes) as server:
        assert send(server, body(png(GRAY))) == (500, {"error": "RuntimeError: out of memory"})
        assert send(server, body(png(GRAY))) == (200, {"scores": [7.0]})
    assert "Traceback" in capsys.readouterr().err


def test_a_users_reward_that_fails_is_not_the_clients_fault():
    """Its images may be scored at another attempt; prompts that cannot be scored are refused for good."""

    def fails(*_):
        raise ValueError("no memory")

    def refuses(*_):
        raise UserError("expected quotes")

    for reward, status in ((fails, 500), (refuses, 400)):
        with serving(CheckedReward("mine", reward, own=True)) as server:
            assert send(server, body(png(GRAY)))[0] == status


def test_a_score_that_did_not_come_is_null():
    with serving(CheckedReward("mine", lambda *_: [None, 1.0], own=True)) as server:
        assert send(server, body(png(GRAY), png(GRAY))) == (200, {"scores": [None, 1.0]})


HALVES = (b"", b"POST / HT", b"POST / HTTP/1.1\r\nContent-Length: 50\r\n\r\n{")


def test_many_clients_at_once_beside_silent_ones():
    """All are answered, one request is scored at a time, and few are in memory."""
    busy, lock, held, most = threading.Lock(), threading.Lock(), 0, 0

    def alone(images, _):
        nonlocal held
        assert busy.acquire(blocking=False)
        time.sleep(0.002)
        busy.release()
        with lock:
            held -= 1
        return images.mean((1, 2, 3)) * 255

    def counted(request):
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        return read_request(request)

    with pytest.MonkeyPatch.context() as patch, serving(alone) as server, contextlib.ExitStack() as silent:
        patch.setattr(serve, "read_request", counted)
        for index in range(100):
            silent.enter_context(connect(server, HALVES[index % 3]))
        reward = client(server, batch=1, concurrency=64)
        np.testing.assert_allclose(reward(*numbered(192)), np.arange(192), rtol=1e-5)
    assert not reward.faults
    assert 1 < most <= serve.REQUESTS_AT_ONCE


def test_who_is_silent_is_let_go_but_not_who_waits_for_an_answer(monkeypatch):
    monkeypatch.setattr(serve, "SILENCE", 1)
    silence_is_over = threading.Event()

    def late(images, _):
        assert silence_is_over.wait(30)
        return np.zeros(len(images))

    with serving(late) as server:
        pending = client(server).start(*numbered(2))
        for sent in HALVES:
            with connect(server, sent) as silent:
                assert silent.recv(100) == b""
        silence_is_over.set()
        np.testing.assert_array_equal(pending(), [0, 0])


def test_nothing_is_scored_for_who_is_gone(monkeypatch):
    monkeypatch.setattr(serve, "REQUESTS_AT_ONCE", 1)
    begun, go, scored = threading.Event(), threading.Event(), []

    def when_told(images, prompts):
        begun.set()
        assert go.wait(30)
        scored.extend(prompts)
        return np.zeros(len(images))

    with serving(when_told) as server:
        first = client(server).start(*numbered(1))
        assert begun.wait(30)
        request = body(png(GRAY))
        with connect(server, b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(request) + request):
            while len(server._open) < 4:  # the loop's own two, the first client, the one that goes
                time.sleep(0.01)
        while len(server._open) > 3:
            time.sleep(0.01)
        go.set()
        np.testing.assert_array_equal(first(), [0])
    assert scored == ["prompt 0"]


def test_closing_waits_for_the_answers_under_way():
    begun, go, scores = threading.Event(), threading.Event(), []

    def when_told(images, _):
        begun.set()
        go.wait(30)
        return np.zeros(len(images))

    with serving(when_told) as server:
        asking = threading.Thread(target=lambda: scores.append(client(server)(*numbered(2))))
        asking.start()
        assert begun.wait(30)
        closing = threading.Thread(target=server.close)
        closing.start()
        closing.join(0.2)
        assert closing.is_alive()
        go.set()
        closing.join(30)
        asking.join(30)
    np.testing.assert_array_equal(scores, [[0, 0]])
