"""A server on loopback that does wrong what a server can do wrong.

An *answer* is a function of the handler of a request and its JSON. The images of these tests are of one value, their
index (`numbered`), so that a score says which image it was given for.
"""

import base64
import http.server
import io
import json
import threading

import numpy as np
from PIL import Image


def numbered(count, height=4, width=6):
    """Images [count, H, W, 3] in [0, 1], and prompts, each with its index in it."""
    images = np.broadcast_to(np.arange(count)[:, None, None, None] / 255, (count, height, width, 3))
    return images.astype(np.float32), [f"prompt {index}" for index in range(count)]


def indices(request):
    """The numbers of a request's images and prompts, of either API, after a check that they belong together."""
    if "messages" in request:
        image, text = request["messages"][0]["content"]
        files, prompts = [image["image_url"]["url"].partition(",")[2]], [text["text"]]
    else:
        files, prompts = request["images"], request["prompts"]
    found = [int(np.asarray(Image.open(io.BytesIO(base64.b64decode(file)))).mean().round()) for file in files]
    for index, prompt in zip(found, prompts, strict=True):
        assert f"prompt {index}" in prompt
    return found


def reply(handler, body, status=200, length=None, **headers):
    handler.leave()  # before the client, that has its answer, can come again
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body) if length is None else length))
    handler.end_headers()
    handler.wfile.write(body)


def right(handler, request):
    """The score of an image is its index and a half."""
    reply(handler, {"scores": [index + 0.5 for index in indices(request)]})


def says(body, status=200, **headers):
    return lambda handler, _: reply(handler, body, status, **headers)


def chats(text):
    """A chat completion of `text`, in which # is the image's index."""

    def answer(handler, request):
        content = text.replace("#", str(indices(request)[0]))
        reply(handler, {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]})

    return answer


def closes(*_):
    """Closes without a byte."""


def closes_midway(handler, _):
    reply(handler, b'{"scores": [1', length=100)


def resets(handler, _):
    handler.connection.shutdown(2)


def silent(handler, _):
    """Says nothing, until the test is over."""
    handler.server.over.wait()


def trickles(handler, _):
    """A byte of an endless head from time to time: never silent for long, never done."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b"x")


def trickles_body(handler, _):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b" ")


def continues(handler, _):
    """Asks for patience without end."""
    while not handler.server.over.wait(0.02):
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def floods(handler, _):
    """More bytes than a client can hold."""
    handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
    while not handler.server.over.is_set():
        handler.wfile.write(b" " * 2**16)


class FaultServer(http.server.ThreadingHTTPServer):
    """Gives `answers` one after the other, the last of them for ever; `with` it as a context.

    Attributes:
      requests: those that came, as JSON; `paths` and `headers` are theirs.
      most_at_once: the largest number of them that were under way together, until their answers began.
    """

    daemon_threads = True

    def __init__(self, *answers, port=0):
        self.answers = list(answers)
        self.requests, self.paths, self.headers = [], [], []
        self.at_once = self.most_at_once = 0
        self.lock, self.over = threading.Lock(), threading.Event()
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        """Clients that go away are what is tested."""


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            server.requests.append(request)
            server.paths.append(self.path)
            server.headers.append(dict(self.headers))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
            self.under_way = True
        try:
            answer(self, request)
        finally:
            self.leave()

    def leave(self):
        """The request is under way no longer; the second time nothing happens."""
        with self.server.lock:
            self.server.at_once -= self.under_way
            self.under_way = False

    def log_message(self, *_):
        pass
