"""A server for one scorer and many clients."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import signal
import threading
import traceback
from http import HTTPStatus
from typing import Any

import numpy as np

from egrpo_jax.common.errors import UserError
from egrpo_jax.rewards.base import Reward, with_nan
from egrpo_jax.rewards.checked import RewardError
from egrpo_jax.rewards.remote.scores import read_request

LONGEST_REQUEST = 2**28


REQUESTS_AT_ONCE = 8


SILENCE = 60
"""Seconds without a byte from a client after which its connection is closed."""


class BadRequest(Exception):
    """What a client did wrong."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class ScoreServer(http.server.ThreadingHTTPServer):
    """One scorer for many clients: it scores one request at a time, and holds few in memory."""

    daemon_threads = False  # closing waits for the answers under way

    def __init__(self, name: str, reward: Reward, host: str, port: int):
        """Raises OSError: the address cannot be had."""
        self.name, self._reward = name, reward
        self.slots, self._scoring = threading.BoundedSemaphore(REQUESTS_AT_ONCE), threading.Lock()
        super().__init__((host, port), _Handler)

    def score(self, body: bytes) -> dict[str, Any]:
        """The answer to the request `body`.

        Raises:
          BadRequest: it is not as the protocol has it, or the scorer cannot use its images or prompts.
        """
        try:
            images, prompts = read_request(json.loads(body))
            with self._scoring:
                scores = np.asarray(with_nan(self._reward(images, prompts)), np.float32)
        except RewardError:  # not the client's fault
            raise
        except (ValueError, RecursionError, UserError) as error:
            raise BadRequest(HTTPStatus.BAD_REQUEST, str(error)) from None
        return {"scores": [float(score) if math.isfinite(score) else None for score in scores]}


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ScoreServer
    timeout = SILENCE

    def do_GET(self) -> None:
        self._answer(HTTPStatus.OK, {"reward": self.server.name})

    def do_POST(self) -> None:
        try:
            with self.server.slots:
                answer = self.server.score(self._body())
        except BadRequest as error:
            self._refuse(error.status, str(error))
        except Exception as error:  # the scorer's: this request has no scores, the next may
            traceback.print_exc()
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
        else:
            self._answer(HTTPStatus.OK, answer)

    def _body(self) -> bytes:
        """The request. Raises BadRequest if it is not for here, too long or too slow."""
        if self.path != "/":
            raise BadRequest(HTTPStatus.NOT_FOUND, f"expected POST to /, found {self.path}")
        text = self.headers.get("Content-Length", "")
        if not text.isdecimal():
            raise BadRequest(HTTPStatus.LENGTH_REQUIRED, f"expected a Content-Length, found {text!r}")
        if int(text) > LONGEST_REQUEST:
            raise BadRequest(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {LONGEST_REQUEST} bytes, found {text}"
            )
        try:
            return self.rfile.read(int(text))
        except OSError as error:
            raise BadRequest(HTTPStatus.REQUEST_TIMEOUT, f"{type(error).__name__}: {error}") from None

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        line = " ".join(message.split())
        self.log_error("%d: %s", status, line)
        self._answer(status, {"error": line})

    def _answer(self, status: HTTPStatus, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        with contextlib.suppress(OSError):  # the client is gone
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_request(self, *_: object) -> None:
        """Only what goes wrong is logged."""


def serve(server: ScoreServer) -> None:
    """Answers until SIGTERM or SIGINT, then ends the answers under way and closes."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    stop.wait()
    server.shutdown()
    server.server_close()
