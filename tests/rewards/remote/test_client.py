"""Scores from another machine, and every way in which they do not come."""

import gc
import socket
import threading
import time
import weakref

import numpy as np
import pytest

from egrpo_jax.common.config import from_config_dict, to_config_dict
from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.images import to_uint8
from egrpo_jax.rewards import ScorersConfig, load_reward, start
from egrpo_jax.rewards.config import RemoteConfig
from egrpo_jax.rewards.remote.address import ascii_url
from egrpo_jax.rewards.remote.client import remote
from egrpo_jax.rewards.remote.post import Fault
from egrpo_jax.rewards.remote.scores import Scores
from tests import fault_server
from tests.fault_server import FaultServer, numbered, right, says

FOREVER = 30.0


def make(url, **changes):
    quick = {"batch": 2, "concurrency": 3, "timeout": FOREVER, "deadline": FOREVER, "retries": 2, "backoff": 0.01}
    return remote("judge", RemoteConfig(url, **quick | changes))


def expected(count):
    return np.arange(count, dtype=np.float32) + 0.5


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_image_gets_its_score(count, batch):
    with FaultServer(right) as server:
        reward = make(server.url + "/at?v=1", batch=batch)
        scores = reward(*numbered(count))
        np.testing.assert_array_equal(scores, expected(count))
        assert scores.dtype == np.float32
        assert len(server.requests) == -(-count // batch)
        assert set(server.paths) <= {"/at?v=1"}
    assert not reward.faults


def working():
    """The threads that have requests under way."""
    return [thread for thread in threading.enumerate() if "_work" in thread.name]


def test_it_is_found_by_its_name_in_the_config():
    with FaultServer(right) as server:
        scorers = from_config_dict(ScorersConfig, {"remote": {"judge": {"url": server.url, "batch": 4}}})
        np.testing.assert_array_equal(load_reward("judge", scorers)(*numbered(5)).values, expected(5))
        assert len(server.requests) == 2


def test_a_config_file_keeps_it():
    scorers = ScorersConfig(
        remote={"judge": RemoteConfig("http://a:1/b", patterns=(r"(\d)",)), "b": RemoteConfig("http://b")}
    )
    assert from_config_dict(ScorersConfig, to_config_dict(scorers)) == scorers


def test_answers_in_any_order_go_to_their_own_images():
    """All requests of a round are there before one is answered, the last first."""
    at_once, arrived, answered = 6, threading.Barrier(6), threading.Condition()
    order = []

    def permuted(handler, request):
        turn = at_once - 1 - arrived.wait(FOREVER)
        with answered:
            answered.wait_for(lambda: len(order) % at_once == turn, FOREVER)
            order.append(request["prompts"])  # before the answer, after which the test may be over
            right(handler, request)
            answered.notify_all()

    with FaultServer(permuted) as server:
        reward = make(server.url, concurrency=at_once)
        np.testing.assert_array_equal(reward(*numbered(36)), expected(36))
        assert server.most_at_once == at_once
    assert len(order) == 18


def test_requests_at_once_are_bounded():
    both = threading.Barrier(2)

    def in_pairs(handler, request):
        both.wait(FOREVER)
        right(handler, request)

    with FaultServer(in_pairs) as server:
        np.testing.assert_array_equal(make(server.url, concurrency=2)(*numbered(20)), expected(20))
        assert server.most_at_once == 2


def test_no_request_is_made_before_its_turn(monkeypatch):
    """Encoded images take memory too."""
    made, go, build = [], threading.Event(), Scores.request
    monkeypatch.setattr(Scores, "request", lambda *args: made.append(1) or build(*args))

    def when_told(handler, request):
        go.wait(FOREVER)
        right(handler, request)

    with FaultServer(when_told) as server:
        pending = make(server.url, concurrency=2).start(*numbered(20))
        while server.at_once < 2:
            time.sleep(0.01)
        assert len(made) == 2
        go.set()
        np.testing.assert_array_equal(pending(), expected(20))
    assert len(made) == 10


def test_scoring_goes_on_in_the_background():
    go = threading.Event()

    def when_told(handler, request):
        go.wait(FOREVER)
        right(handler, request)

    with FaultServer(when_told) as server:
        pending = start(make(server.url), *numbered(6))
        go.set()
        np.testing.assert_array_equal(pending(), expected(6))
        assert pending() is pending()


def test_images_of_one_call_at_most_are_held(monkeypatch):
    """The second call copies its images only when those of the first are scored, and let go."""
    copies, go = [], threading.Event()

    def copy(images):
        copied = to_uint8(images)
        gc.collect()
        assert not [kept for kept in copies if kept() is not None]
        copies.append(weakref.ref(copied))
        return copied

    def when_told(handler, request):
        go.wait(FOREVER)
        right(handler, request)

    monkeypatch.setattr("egrpo_jax.rewards.remote.client.to_uint8", copy)
    with FaultServer(when_told) as server:
        reward, pending = make(server.url), []
        first = reward.start(*numbered(8))
        second = threading.Thread(target=lambda: pending.append(reward.start(*numbered(8))))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        assert len(copies) == 1
        go.set()
        second.join(FOREVER)
        for scores in (first(), pending[0]()):
            np.testing.assert_array_equal(scores, expected(8))
    assert len(copies) == 2


PASSING = {
    "HTTP 429": says({"error": "later"}, 429),
    "HTTP 500": says(b"", 500),
    "HTTP 502": says(b"<html>", 502),
    "HTTP 503": says(b"", 503),
    "HTTP 504": says(b"", 504),
    "connection": fault_server.closes,
    "connection ": fault_server.closes_midway,
    "connection  ": fault_server.resets,
    "not JSON": says(b"\xff\xfegarbage"),
    "not JSON ": says(b"[" * 100_000),
    "wrong answer": says({"scores": [1.0]}),
    "wrong answer ": says({"scores": {"0": 1.0}}),
    "wrong answer  ": says([1.0, 2.0]),
    "not a number": says(b'{"scores": [NaN, NaN]}'),
    "not a number ": says(b'{"scores": [1e39, -Infinity]}'),
    "not a number  ": says({"scores": ["0.5", True]}),
    "not a number   ": says(b'{"scores": [null, 1' + b"0" * 400 + b"]}"),
}


@pytest.mark.parametrize("kind", PASSING)
def test_a_fault_that_passes_costs_no_score(kind, capsys):
    with FaultServer(PASSING[kind], PASSING[kind], right) as server:
        reward = make(server.url, concurrency=1)
        np.testing.assert_array_equal(reward(*numbered(4)), expected(4))
        assert len(server.requests) == 4
    assert reward.faults == {kind.strip(): 2}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: reward 'judge' at http://127.0.0.1:{server.server_port}: {kind.strip()}: ")


@pytest.mark.parametrize("kind", PASSING)
def test_a_fault_that_stays_costs_the_scores_of_its_images(kind, capsys):
    def second_fails(handler, request):
        (PASSING[kind] if "prompt 2" in request["prompts"] else right)(handler, request)

    with FaultServer(second_fails) as server:
        reward = make(server.url)
        scores = reward(*numbered(6))
        assert len(server.requests) == 5
    np.testing.assert_array_equal(scores, [0.5, 1.5, np.nan, np.nan, 4.5, 5.5])
    assert reward.faults == {kind.strip(): 3, "missing": 2}
    assert "missing: 2 of 6 scores never came\n" in capsys.readouterr().err


@pytest.mark.parametrize("status", [301, 400, 401, 404, 413])
def test_what_another_attempt_would_not_mend_has_none(status):
    with FaultServer(says({"error": "no"}, status)) as server:
        reward = make(server.url)
        assert np.isnan(reward(*numbered(2))).all()
        assert len(server.requests) == 1
    assert reward.faults == {f"HTTP {status}": 1, "missing": 2}


def test_one_image_without_a_score_leaves_the_others_of_its_request():
    with FaultServer(says(b'{"scores": [NaN, 3]}')) as server:
        scores = make(server.url, retries=1)(*numbered(2))
        assert len(server.requests) == 2
    np.testing.assert_array_equal(scores, [np.nan, 3])


def test_an_answer_without_end_is_cut():
    with FaultServer(fault_server.floods, right) as server:
        reward = make(server.url)
        np.testing.assert_array_equal(reward(*numbered(2)), expected(2))
    assert reward.faults == {"too long": 1}


SLOW = [fault_server.silent, fault_server.trickles, fault_server.trickles_body, fault_server.continues]


@pytest.mark.parametrize("slow", SLOW)
def test_a_slow_answer_is_given_up(slow):
    with FaultServer(slow, right) as server:
        reward = make(server.url, timeout=0.3, concurrency=1, retries=20)
        np.testing.assert_array_equal(reward(*numbered(4)), expected(4))
    assert set(reward.faults) == {"timeout"}


def test_a_server_that_does_not_listen_is_given_up():
    noise = np.random.default_rng(0).uniform(size=(2, 1024, 1024, 3))  # more than the system takes off our hands
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        reward = make(f"http://127.0.0.1:{deaf.getsockname()[1]}", timeout=0.3, retries=0)
        assert np.isnan(reward(noise, ["a", "b"])).all()
    assert reward.faults == {"timeout": 1, "missing": 2}


@pytest.mark.parametrize("slow", SLOW)
def test_no_call_lasts_beyond_its_deadline(slow, capsys):
    """Whatever was there by then is kept, and what was under way is given up."""
    with FaultServer(right, slow) as server:
        reward = make(server.url, deadline=1.0, concurrency=1)
        begun = time.monotonic()
        scores = reward(*numbered(4))
        assert 0.9 < time.monotonic() - begun < 8
        for thread in working():
            thread.join(8)
            assert not thread.is_alive()
    np.testing.assert_array_equal(scores, [0.5, 1.5, np.nan, np.nan])
    assert reward.faults["missing"] == 2
    assert "2 of 4 scores never came within 1 s" in capsys.readouterr().err


def test_a_thread_that_is_stuck_holds_nobody_up(monkeypatch):
    """In a look-up of the server's name, say, which has no timeout; what it brings in the end changes nothing."""
    go, done = threading.Event(), threading.Event()

    def stuck(*_):
        go.wait(FOREVER)
        done.set()
        return {"scores": [1.0, 2.0]}

    monkeypatch.setattr("egrpo_jax.rewards.remote.client.post", stuck)
    reward = make("http://127.0.0.1:1", deadline=0.2)
    pending = reward.start(*numbered(2))
    assert np.isnan(pending()).all()
    go.set()
    done.wait(FOREVER)
    np.testing.assert_array_equal(reward(*numbered(2)), [1.0, 2.0])
    assert np.isnan(pending()).all()


def test_a_server_that_is_down_and_comes_back_loses_no_score(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    reward = make(f"http://127.0.0.1:{port}", retries=50, backoff=0.02)
    pending = reward.start(*numbered(6))
    while not reward.faults["connection"]:
        time.sleep(0.01)
    server = FaultServer(right, port=port)
    with server:
        np.testing.assert_array_equal(pending(), expected(6))
    assert set(reward.faults) == {"connection"}
    assert capsys.readouterr().err.count("Connection refused") == 1


def test_pauses_double_and_stay_below_their_limit(monkeypatch):
    pauses = []
    monkeypatch.setattr("egrpo_jax.rewards.remote.client.time.sleep", pauses.append)
    with FaultServer(says(b"", 503)) as server:
        make(server.url, retries=7, backoff=1.0, deadline=1000.0)(*numbered(1))
    full = np.array([1, 2, 4, 8, 16, 30, 30])
    assert (pauses <= full).all()
    assert (pauses >= full / 2).all()


def test_pauses_of_many_attempts_can_be_computed(monkeypatch):
    def down(*_):
        raise Fault("connection", "refused")

    monkeypatch.setattr("egrpo_jax.rewards.remote.client.post", down)
    reward = make("http://127.0.0.1:1", retries=1000, backoff=0.0)
    assert np.isnan(reward(*numbered(1))).all()
    assert reward.faults == {"connection": 1001, "missing": 1}


@pytest.mark.parametrize(
    ("asked", "pause"),
    [("7", [7]), ("5000", [1000]), ("0", [1]), ("9" * 5000, [1000]), ("-3", [1]), ("soon", [1]), ("²", [1])],
)
def test_a_server_that_wants_to_be_left_alone_is(monkeypatch, asked, pause):
    pauses = []
    monkeypatch.setattr("egrpo_jax.rewards.remote.client.time.sleep", pauses.append)
    with FaultServer(says(b"", 503, Retry_After=asked), right) as server:
        np.testing.assert_array_equal(make(server.url, backoff=1.0, deadline=1000.0)(*numbered(1)), expected(1))
    if pause == [1]:
        assert 0.5 <= pauses[0] <= 1
    else:
        np.testing.assert_allclose(pauses, pause, rtol=0.05)


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with FaultServer(right) as server:
        np.testing.assert_array_equal(make(server.url, retries=0)(*numbered(2)), expected(2))


def test_a_server_without_tls_is_not_spoken_to_by_https():
    with FaultServer(right) as server:
        reward = make(server.url.replace("http:", "https:"), retries=0, timeout=5.0)
        assert np.isnan(reward(*numbered(1))).all()
        assert not server.requests
    assert reward.faults == {"connection": 1, "missing": 1}


def test_threads_keep_no_process_and_end_by_themselves():
    with FaultServer(right) as server:
        call = make(server.url).start(*numbered(6))
        mine = working()
        assert all(thread.daemon for thread in mine)
        call()
        assert not any(thread.is_alive() for thread in mine)


def test_a_mistake_of_ours_is_raised_not_counted(monkeypatch):
    def broken(*_):
        raise TypeError("not the server's")

    monkeypatch.setattr("egrpo_jax.rewards.remote.client.post", broken)
    with pytest.raises(TypeError, match="not the server's"):
        make("http://127.0.0.1:1")(*numbered(2))


@pytest.mark.parametrize("images", [np.zeros((2, 4, 4, 3)), np.zeros((3, 4, 4)), np.zeros((3, 4, 4, 4))])
def test_wrong_shapes_are_refused(images):
    with pytest.raises(ValueError, match="3 prompts need images"):
        make("http://127.0.0.1:1").start(images, ["a", "b", "c"])


def test_the_key_is_sent_and_never_shown(monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", "secret-7\n")
    with FaultServer(says(b"", 503), right) as server:
        make(server.url + "?token=hidden", api_key="JUDGE_KEY")(*numbered(2))
        assert server.headers[0]["Authorization"] == "Bearer secret-7"
    shown = capsys.readouterr().err
    assert "HTTP 503" in shown
    assert "secret-7" not in shown
    assert "hidden" not in shown


@pytest.mark.parametrize(
    "key", [None, "", " ", "secret-7\nX: y", "secret-7\x00", "secret-7ü", "secret-7\u20288", "秘密"]
)
def test_a_key_that_is_none_is_named_not_shown(monkeypatch, key):
    monkeypatch.setattr("os.environ", {} if key is None else {"JUDGE_KEY": key})
    with pytest.raises(ConfigError, match=r"config.api_key: found 'JUDGE_KEY'") as caught:
        make("http://127.0.0.1:1", api_key="JUDGE_KEY")
    assert "secret" not in str(caught.value)


def test_a_key_in_the_place_of_its_name_is_not_shown():
    with pytest.raises(ConfigError, match=r"api_key: found '...', expected the name of an env") as caught:
        make("http://127.0.0.1:1", api_key="sk-secret-7")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("url", url) for url in ("", "localhost:8000", "ftp://a", "http://", "http://me:word@a", "http://a:x")),
        *(
            ("url", url)
            for url in ("http://a b", "http://a/b c", " http://a", "http://a\n", "http://a\t/b", "http://a\0")
        ),
        *(
            ("url", url)
            for url in ("http://a:0", "http://a:70000", "http://a:-1", "http://a/#b", "http://a\\b", "http://.a")
        ),
        *(("url", url) for url in ("http://[::1", "http://[::g]", "http://::1:8000", "http://[fe80::1%25eth0]:80")),
        *(
            ("url", url)
            for url in ("http://straße.example", f"http://{'ü' * 64}.example", "http://ü..example", "http://℀")
        ),
        *((key, 0) for key in ("batch", "concurrency", "max_tokens", "timeout", "deadline", "best")),
        *(("retries", -1), ("backoff", -0.1), ("timeout", float("inf")), ("api", "grpc")),
    ],
)
def test_a_wrong_config_names_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"config\.remote\.judge\.{key}: found") as caught:
        from_config_dict(ScorersConfig, {"remote": {"judge": {"url": "http://a", key: value}}})
    assert "word" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("http://müller.example/score", "http://xn--mller-kva.example/score"),
        ("http://mu\u0308ller.example", "http://xn--mller-kva.example"),
        (
            "https://Grün.example:8443/Größe/ä?ü=ö&a=b",
            "https://xn--grn-ioa.example:8443/Gr%C3%B6%C3%9Fe/%C3%A4?%C3%BC=%C3%B6&a=b",
        ),
        ("http://my_scorer:8000/a%20b;c=(1)?x=%2F", "http://my_scorer:8000/a%20b;c=(1)?x=%2F"),
        ("http://xn--strae-oqa.example.", "http://xn--strae-oqa.example."),
        ("http://[2001:DB8::0:1]:8000/s", "http://[2001:db8::1]:8000/s"),
        ("http://[::1]", "http://[::1]"),
    ],
)
def test_addresses_are_sent_in_ascii(url, sent):
    assert ascii_url(RemoteConfig(url).url) == sent
    assert ascii_url(sent) == sent


def test_a_path_with_umlauts_is_asked_for():
    with FaultServer(right) as server:
        np.testing.assert_array_equal(make(server.url + "/größe?ü=1")(*numbered(2)), expected(2))
        assert server.paths == ["/gr%C3%B6%C3%9Fe?%C3%BC=1"]
