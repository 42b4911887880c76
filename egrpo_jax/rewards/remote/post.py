"""HTTP requests that end in time and in bounded memory, whatever the server does.

They go through urllib3, which needs no other package (requests, httpx and aiohttp bring four to nine) and uses no
proxy, redirection or attempt of its own unless told to. No timeout of a socket is a deadline, since it starts anew
with each byte and a server that trickles bytes is never late: so the connection is shut from outside when it is over.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

LONGEST_ANSWER = 4 * 2**20
RETRIED = (429, 500, 502, 503, 504)


class Fault(Exception):
    """A request that brought no scores.

    Attributes:
      kind: what is counted.
      retry: whether another attempt may do better.
      after: seconds which the server wants to be left alone before.
    """

    def __init__(self, kind: str, detail: str, retry: bool = True, after: float = 0.0):
        super().__init__(f"{kind}: {' '.join(detail.split())[:200]}")
        self.kind, self.retry, self.after = kind, retry, after


def post(url: str, body: bytes, headers: Mapping[str, str], timeout: float) -> Any:
    """Sends `body`, which is JSON, and returns the content of the answer, which is JSON too.

    Args:
      url: http or https, in ASCII.
      body: of the request.
      headers: beside that of the content's type.
      timeout: seconds for all of it.

    Raises:
      Fault: "timeout", "connection", "HTTP <status>", "too long" or "not JSON".
    """
    deadline = time.monotonic() + timeout
    try:
        status, after, answer = _exchange(url, body, headers, deadline)
    except (OSError, HTTPException, HTTPError) as error:
        if time.monotonic() >= deadline:
            raise Fault("timeout", f"no whole answer within {timeout:.3g} s") from None
        raise Fault("connection", f"{type(error).__name__} {error}") from None
    if status != HTTPStatus.OK:
        raise Fault(f"HTTP {status}", answer[:200].decode(errors="replace"), status in RETRIED, after)
    if len(answer) > LONGEST_ANSWER:
        raise Fault("too long", f"the answer has more than {LONGEST_ANSWER} bytes")
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        raise Fault("not JSON", answer[:200].decode(errors="replace")) from None


def _exchange(url: str, body: bytes, headers: Mapping[str, str], deadline: float) -> tuple[int, float, bytes]:
    """Status, seconds to wait before another attempt, and body, which is cut one byte after the longest answer."""
    parts = urlsplit(url)
    kind, port = (HTTPSConnection, 443) if parts.scheme == "https" else (HTTPConnection, 80)
    timeout = max(deadline - time.monotonic(), 1e-3)  # 0 would be: do not wait at all
    connection = kind(parts.hostname or "", parts.port or port, timeout=timeout)
    with contextlib.closing(connection):
        connection.connect()
        with _shut_at(deadline, connection.sock):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
                target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
                headers = {"Content-Type": "application/json", **headers}
                connection.request("POST", target, body, headers, preload_content=False)
            response = connection.getresponse()
            answer = response.read(LONGEST_ANSWER + 1)
    if time.monotonic() >= deadline:  # an answer without a length seems whole wherever it is cut
        raise TimeoutError
    after = response.headers.get("Retry-After", "")
    return response.status, float(after) if after.isdecimal() else 0.0, answer  # a date needs clocks that agree


@contextlib.contextmanager
def _shut_at(deadline: float, sock: socket.socket) -> Iterator[None]:
    """Ends at `deadline` what waits for `sock` within."""
    timer = threading.Timer(deadline - time.monotonic(), _shut, (sock,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already
        # Not the method of an SSL socket, which would take its state away from who reads.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
