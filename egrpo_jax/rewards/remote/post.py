"""One HTTP request that ends in time and in bounded memory, whatever the server does.

The socket's own timeout starts anew with each byte, so that a server which trickles bytes is never late: here one
deadline holds for all of a request. Proxies named in the environment are not used.
"""

from __future__ import annotations

import functools
import http.client
import io
import json
import socket
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

LONGEST_ANSWER = 4 * 2**20
RETRIED = (429, 500, 502, 503, 504)


class Fault(Exception):
    """No scores came of a request. `kind` is what is counted; `retry` says whether another attempt may do better."""

    def __init__(self, kind: str, detail: str, retry: bool = True):
        super().__init__(f"{kind}: {' '.join(detail.split())[:200]}")
        self.kind, self.retry = kind, retry


def post(url: str, body: bytes, headers: Mapping[str, str], timeout: float) -> Any:
    """What the JSON answer to `body`, which is JSON too, says.

    Args:
      url: http or https.
      body: of the request.
      headers: beside that of the content's type.
      timeout: seconds for all of it.

    Raises:
      Fault: "timeout", "connection", "HTTP <status>", "too long" or "not JSON".
    """
    try:
        status, answer = _exchange(url, body, headers, time.monotonic() + timeout)
    except TimeoutError:
        raise Fault("timeout", f"no whole answer within {timeout:.3g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise Fault("connection", f"{type(error).__name__} {error}") from None
    if status != http.client.OK:
        raise Fault(f"HTTP {status}", answer[:200].decode(errors="replace"), retry=status in RETRIED)
    if len(answer) > LONGEST_ANSWER:
        raise Fault("too long", f"the answer has more than {LONGEST_ANSWER} bytes")
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        raise Fault("not JSON", answer[:200].decode(errors="replace")) from None


def _exchange(url: str, body: bytes, headers: Mapping[str, str], deadline: float) -> tuple[int, bytes]:
    """Status and body, which is cut one byte after the longest answer."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.netloc, timeout=_left(deadline))
    connection.response_class = functools.partial(_Response, deadline=deadline)  # type: ignore[assignment]
    try:
        connection.connect()
        connection.sock.settimeout(_left(deadline))
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", target, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        answer = response.read(LONGEST_ANSWER + 1)
        if response.length and len(answer) <= LONGEST_ANSWER:  # read(n) takes a short answer for a whole one
            raise http.client.IncompleteRead(answer, response.length)
        return response.status, answer
    finally:
        connection.close()


class _Response(http.client.HTTPResponse):
    """A response all of which, from the first byte of its head, must be there by `deadline`."""

    def __init__(self, sock: socket.socket, *args: Any, deadline: float, **kwargs: Any):
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Until(deadline, sock, self.fp.detach()))


class _Until(io.RawIOBase):
    """The bytes of `file`, which reads from `sock`, until `deadline`."""

    def __init__(self, deadline: float, sock: socket.socket, file: io.RawIOBase):
        self._deadline, self._sock, self._file = deadline, sock, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._deadline))
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()


def _left(deadline: float) -> float:
    """Seconds until `deadline`. Raises TimeoutError if it is past."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
