"""A server for one reward and many clients.

Waitress speaks HTTP for it: no other package comes with it (with uvicorn and aiohttp four to nine), it reads requests
in one loop, so that a silent client holds no thread up, and keeps those that wait their turn on disk.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import socket
import sys
import threading
import traceback
from http import HTTPStatus
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

import waitress
from waitress import wasyncore

from egrpo_jax.rewards.checked import CheckedReward, UnfitInputError
from egrpo_jax.rewards.remote.scores import read_request

LONGEST_REQUEST = 2**28
"""Bytes; one of so many is refused already."""

REQUESTS_AT_ONCE = 4
"""Requests held in memory: one is scored, the next ones are decoded."""

CONNECTIONS = 400
"""Clients that are listened to at once, each with up to two open files; more wait to be let in."""

SILENCE = 60
"""Seconds without a byte from a client, while no answer is due, after which its connection is closed."""


class BadRequest(Exception):
    """A mistake of the client's."""

    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class ScoreServer:
    """One reward for many clients: it scores one request at a time, and holds few in memory.

    Attributes:
      port: where it listens.
    """

    def __init__(self, name: str, reward: CheckedReward, host: str, port: int):
        """Raises OSError or UnicodeError: the address cannot be had."""
        self._name, self._reward, self._scoring = name, reward, threading.Lock()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
        self.port: int = listener.getsockname()[1]
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # that requests wait is no news
        self._closed, self._open = threading.Event(), dict[int, Any]()
        self._server = waitress.create_server(
            self._respond,
            map=self._open,
            sockets=[listener],
            threads=REQUESTS_AT_ONCE,
            max_request_body_size=LONGEST_REQUEST,
            connection_limit=CONNECTIONS,
            channel_timeout=SILENCE,
            cleanup_interval=1,
            channel_request_lookahead=1,  # to see that a client is gone, and not to score for it
            recv_bytes=2**16,
        )

    def run(self) -> None:
        """Answers until it is closed."""
        while not self._closed.is_set():
            wasyncore.loop(timeout=0.1, use_poll=True, map=self._open, count=1)
        wasyncore.close_all(self._open)

    def close(self) -> None:
        """Ends the answers under way, drops the requests that wait, and makes `run` return."""
        self._server.task_dispatcher.shutdown(timeout=math.inf)
        self._closed.set()

    def _respond(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        status, answer = self._answer(environ)
        body = json.dumps(answer).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        start_response(f"{status.value} {status.phrase}", headers)
        return [body]

    def _answer(self, environ: WSGIEnvironment) -> tuple[HTTPStatus, dict[str, Any]]:
        """Status and JSON of the answer, whatever happens; what goes wrong is also a line on stderr."""
        try:
            if environ["REQUEST_METHOD"] == "GET":
                return HTTPStatus.OK, {"reward": self._name}
            return HTTPStatus.OK, {"scores": self._scores(_body(environ))}
        except BadRequest as error:
            status, message = error.status, str(error)
        except Exception as error:  # the reward's: this request has no scores, the next may
            traceback.print_exc()
            status, message = HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}"
        line = " ".join(message.split())
        print(f"{environ['REMOTE_ADDR']}: {status.value}: {line}", file=sys.stderr, flush=True)
        return status, {"error": line}

    def _scores(self, body: bytes) -> list[float | None]:
        """The scores for the request `body`, None for one that did not come.

        Raises:
          BadRequest: it is not as the API has it, or the reward cannot use its images or prompts.
        """
        try:
            images, prompts = read_request(json.loads(body))
            with self._scoring:
                values, came = self._reward(images, prompts)
        except (UnfitInputError, ValueError, RecursionError) as error:
            raise BadRequest(HTTPStatus.BAD_REQUEST, str(error)) from None
        return [float(value) if has_come else None for value, has_come in zip(values, came, strict=True)]


def _body(environ: WSGIEnvironment) -> bytes:
    """The request's. Raises BadRequest if it is not for here."""
    if environ["REQUEST_METHOD"] != "POST" or environ["PATH_INFO"] != "/":
        found = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']!r}"
        raise BadRequest(HTTPStatus.NOT_FOUND, f"expected POST to /, found {found}")
    if "CONTENT_LENGTH" not in environ:
        raise BadRequest(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length, found none")
    return environ["wsgi.input"].read()


def serve(server: ScoreServer) -> None:
    """Answers until SIGTERM or SIGINT, then ends the answers under way and closes; a second signal ends at once."""
    closing = threading.Thread(target=server.close)  # beside the loop that it waits for

    def stop(*_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        closing.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    server.run()
