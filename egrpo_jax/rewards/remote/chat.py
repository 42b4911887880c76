"""The API "chat": a vision model behind an OpenAI-compatible server judges each image in words.

As UnifiedReward (arXiv:2503.05236) is used: image first, then the question, temperature 0; marks from 1 to 5.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.rewards.config import RemoteConfig
from egrpo_jax.rewards.jpeg import to_jpeg
from egrpo_jax.rewards.remote.address import ascii_url
from egrpo_jax.rewards.remote.post import Fault
from egrpo_jax.rewards.remote.scores import to_number

_POINTWISE = """\
The image above was generated from the caption below. Judge it by two criteria:
1. Alignment: are the objects, their attributes and their relations as the caption describes them?
2. Quality: is it clear, detailed, natural in colour, free of artefacts and pleasing?
Explain your judgement briefly. Then end with one line in exactly this form, x a number from 1 (worst) to 5 (best):
Final Score: x

Caption: [{prompt}]"""

_AXES = """\
The image above was generated from the caption below. Give it three marks, each a number from 1 (worst) to 5 (best):
- Alignment: does the image show what the caption asks for?
- Coherence: do objects, bodies and scene make sense, without deformities and artefacts?
- Style: is it pleasing to look at, whatever it shows?
Answer with three lines in exactly this form:
Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Caption: [{prompt}]"""

_MARK = r"[\s*\[]*([1-4](?:\.\d+)?|5(?:\.0+)?)(?!\.?\d)"

BUILT_IN = {
    "pointwise": (_POINTWISE, (rf"Final Score\W{{0,3}}:{_MARK}",)),
    "axes": (
        _AXES,
        tuple(rf"{axis} Score\s*\(1-5\)\W{{0,3}}:{_MARK}" for axis in ("Alignment", "Coherence", "Style")),
    ),
}
"""Question, and patterns of the marks in its answer."""


class Chat:
    """An implementation of `client.Api`."""

    batch = 1

    def __init__(self, config: RemoteConfig):
        """Raises ConfigError: no address, no such template, or a wrong pattern."""
        parts = urlsplit(ascii_url(config.url))
        path = f"{parts.path.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
        self.url = parts._replace(path=path).geturl()
        self._model, self._max_tokens, self._best = config.model, config.max_tokens, config.best
        self._template, self._patterns = _question(config)

    def request(self, images: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
        """The JSON of the request for `images [1, H, W, 3]`, uint8."""
        image = f"data:image/jpeg;base64,{base64.b64encode(to_jpeg(images[0])).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": self._template.replace("{prompt}", prompts[0])},
        ]
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self._max_tokens,
        }

    def scores(self, answer: Any, count: int) -> list[float]:
        """The score, one in a list, in `answer`. Raises Fault if there is no text, or a mark is missing in it."""
        try:
            text = answer["choices"][0]["message"]["content"]
        except (TypeError, KeyError, IndexError):
            text = None
        if not isinstance(text, str):
            raise Fault("wrong answer", f"expected choices[0].message.content, found {answer!r:.150}")
        marks = [mark for pattern in self._patterns for mark in _last(pattern, text)]
        return [to_number(sum(marks) / len(marks) / self._best)] * count


def _last(pattern: re.Pattern[str], text: str) -> list[float]:
    """The marks where `pattern` occurs last in `text`: models repeat the question before they answer it."""
    try:
        return [float(mark) for mark in list(pattern.finditer(text))[-1].groups()]
    except (IndexError, TypeError, ValueError):  # none, a group that took no part, no number
        raise Fault("no mark", f"{pattern.pattern!r} not in {text[-100:]!r}", retry=False) from None


def _question(config: RemoteConfig) -> tuple[str, list[re.Pattern[str]]]:
    template, patterns = BUILT_IN.get(config.template) or (_read(config.template), ())
    try:
        compiled = [re.compile(pattern) for pattern in config.patterns or patterns]
    except re.error as error:
        raise ConfigError("patterns", config.patterns, f"regular expressions ({error})") from None
    if not compiled or not all(pattern.groups for pattern in compiled):
        raise ConfigError("patterns", config.patterns, "regular expressions with a group (...) around each mark")
    return template, compiled


def _read(path: str) -> str:
    try:
        template = Path(path).read_text()
    except (OSError, ValueError) as error:
        raise ConfigError("template", path, f"{', '.join(BUILT_IN)} or a text file ({error})") from None
    if "{prompt}" not in template:
        raise ConfigError("template", path, "a file with {prompt} in it")
    return template
