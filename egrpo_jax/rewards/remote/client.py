"""Rewards on other machines: scored in the background, tried again, and never waited for beyond a deadline.

What goes wrong costs scores: those that did not come are nan, and what to do about them is for the caller to say.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import random
import sys
import threading
import time
import typing
from collections.abc import Sequence
from typing import Any

import chex
import numpy as np
import tqdm

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.images import to_uint8
from egrpo_jax.rewards.base import Pending
from egrpo_jax.rewards.config import RemoteConfig
from egrpo_jax.rewards.remote.chat import Chat
from egrpo_jax.rewards.remote.post import Fault, post
from egrpo_jax.rewards.remote.scores import Scores

LONGEST_PAUSE = 30.0


class Api(typing.Protocol):
    """A way to make requests of images, and scores of answers."""

    url: str
    batch: int

    def request(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
        """The JSON of the request for up to `batch` images `[B, H, W, 3]`, uint8."""

    def scores(self, answer: Any, count: int) -> list[float]:
        """The `count` scores in the JSON `answer`, nan where there is none. Raises Fault if it is no such answer."""


def remote(name: str, config: RemoteConfig) -> RemoteReward:
    """The reward `name` that `config` describes.

    Raises:
      ConfigError: the key, template or patterns that it names are not there or wrong. Nothing is sent yet.
    """
    api = Chat(config) if config.api == "chat" else Scores(config.url, config.batch)
    return RemoteReward(name, config, api)


@dataclasses.dataclass
class _Call:
    """The images handed in at once: which rows of them are still to be sent, and the scores so far."""

    rows: collections.deque[slice]
    scores: np.ndarray
    deadline: float
    threads: list[threading.Thread] = dataclasses.field(default_factory=list)
    seen: set[str] = dataclasses.field(default_factory=set)
    error: Exception | None = None
    result: np.ndarray | None = None

    def left(self) -> float:
        """Seconds until the deadline."""
        return max(0.0, self.deadline - time.monotonic())


class RemoteReward:
    """A reward whose scores come over HTTP, nan where none came.

    Attributes:
      faults: what went wrong, by kind, and how often; "missing" is the number of scores that never came.
    """

    def __init__(self, name: str, config: RemoteConfig, api: Api):
        """Raises ConfigError: the environment has no key."""
        self.faults: collections.Counter[str] = collections.Counter()
        self._name, self._config, self._api = name, config, api
        self._headers = _authorization(config.api_key)
        self._lock = threading.Lock()
        self._last: Pending | None = None

    def __call__(self, images: chex.Array, prompts: Sequence[str]) -> chex.Array:
        """Scores `[B]` of `images [B, H, W, 3]` in [0, 1] for their `prompts`."""
        return self.start(images, prompts)()

    def start(self, images: chex.Array, prompts: Sequence[str]) -> Pending:
        """Begins to score, and returns what waits for the scores.

        Waits itself until the images handed in before are scored or past their deadline: so those of one call at most
        are kept, as uint8, and `concurrency` requests at most are under way.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts need images [{len(prompts)}, H, W, 3], found {images.shape}")
        if self._last is not None:
            self._last()
        count, batch = len(images), self._api.batch
        rows = collections.deque(slice(first, first + batch) for first in range(0, count, batch))
        call = _Call(rows, np.full(count, np.nan, np.float32), time.monotonic() + self._config.deadline)
        work = (call, to_uint8(images), list(prompts))
        for _ in range(min(self._config.concurrency, len(rows))):
            # A daemon: a request under way keeps no process from ending.
            call.threads.append(threading.Thread(target=self._work, args=work, daemon=True))
        for thread in call.threads:
            thread.start()
        self._last = functools.partial(self._wait, call)
        return self._last

    def _wait(self, call: _Call) -> np.ndarray:
        """The scores when all are there, or at the deadline; the same ones each time."""
        if call.result is None:
            for thread in call.threads:
                thread.join(call.left())
            call.result = call.scores.copy()  # what comes later is lost
            missing = int(np.isnan(call.result).sum())
            if missing and call.error is None:
                late = "" if call.left() else f" within {self._config.deadline:g} s"
                self._report(
                    call, Fault("missing", f"{missing} of {call.result.size} scores never came{late}"), missing
                )
        if call.error is not None:
            raise call.error
        return call.result

    def _work(self, call: _Call, images: np.ndarray, prompts: list[str]) -> None:
        """Sends one request after another, in a thread of its own."""
        try:
            while call.left():
                try:
                    rows = call.rows.popleft()
                except IndexError:
                    return
                self._score(call, rows, images[rows], prompts[rows])
        except Exception as error:  # none of the faults of a server: raised where the scores are waited for
            call.error = error

    def _score(self, call: _Call, rows: slice, images: np.ndarray, prompts: list[str]) -> None:
        """Puts the scores of `rows` into `call`, in as many attempts as there may be."""
        body = json.dumps(self._api.request(images, prompts)).encode()
        for attempt in range(self._config.retries + 1):
            if not call.left():
                return
            try:
                self._attempt(call, rows, body)
                return
            except Fault as fault:
                self._report(call, fault)
                if not fault.retry:
                    return
                after = fault.after
            if attempt < self._config.retries:
                time.sleep(min(max(self._pause(attempt), after), call.left()))

    def _attempt(self, call: _Call, rows: slice, body: bytes) -> None:
        """Sends one request. Raises Fault if there is a score that did not come; the others are in `call`."""
        answer = post(self._api.url, body, self._headers, min(self._config.timeout, call.left()))
        scores = np.array(self._api.scores(answer, len(call.scores[rows])), np.float32)
        call.scores[rows] = scores
        if np.isnan(scores).any():
            raise Fault("not a number", f"{np.isnan(scores).sum()} of {scores.size} scores")

    def _pause(self, attempt: int) -> float:
        """Seconds, not the same for all requests, so that they do not come again at the same moment."""
        return min(self._config.backoff * 2.0 ** min(attempt, 64), LONGEST_PAUSE) * random.uniform(0.5, 1)

    def _report(self, call: _Call, fault: Fault, count: int = 1) -> None:
        """Counts `fault`, and prints the first of its kind in a call."""
        with self._lock:
            self.faults[fault.kind] += count
            new = fault.kind not in call.seen
            call.seen.add(fault.kind)
        if new:
            url = self._api.url.partition("?")[0]  # what follows may be secret
            tqdm.tqdm.write(f"warning: reward {self._name!r} at {url}: {fault}", file=sys.stderr)


def _authorization(variable: str | None) -> dict[str, str]:
    """The header with the key in the environment variable `variable`. Raises ConfigError if there is none in it."""
    if variable is None:
        return {}
    if not variable.isidentifier():  # the key itself, perhaps
        raise ConfigError("api_key", "...", "the name of an environment variable that holds the key")
    key = os.environ.get(variable, "").strip()
    if not key or not key.isprintable() or not key.isascii():
        raise ConfigError(
            "api_key", variable, "the name of an environment variable that holds the key, a line of ASCII"
        )
    return {"Authorization": f"Bearer {key}"}
