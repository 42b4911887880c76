"""The config section `scorers`: where the built-in rewards find their files and servers."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Annotated, Literal

from egrpo_jax.common.ranges import Count, Range, check
from egrpo_jax.rewards.remote.address import ascii_url

VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_L_14 = "openai/clip-vit-large-patch14"
Seconds = Annotated[float, Range(1e-3, 10**6)]


@dataclasses.dataclass(frozen=True)
class HpsConfig:
    """HPSv2, both versions.

    Attributes:
      path: its file, the folder that holds it, or its name on the Hub.
      tokenizer: a folder with CLIP's tokenizer, or its name on the Hub.
    """

    path: str = "xswu/HPSv2"
    tokenizer: str = VIT_H_14


@dataclasses.dataclass(frozen=True)
class ClipScoreConfig:
    """The CLIP score.

    Attributes:
      path: a CLIP's folder as open_clip or transformers publish it, or its name on the Hub.
    """

    path: str = VIT_H_14


@dataclasses.dataclass(frozen=True)
class PickScoreConfig:
    """PickScore.

    Attributes:
      path: its folder, or its name on the Hub.
    """

    path: str = "yuvalkirstain/PickScore_v1"


@dataclasses.dataclass(frozen=True)
class ImageRewardConfig:
    """ImageReward.

    Attributes:
      path: its file or folder, or its name on the Hub.
      tokenizer: a folder with BERT's `vocab.txt`, or its name on the Hub.
    """

    path: str = "THUDM/ImageReward"
    tokenizer: str = "google-bert/bert-base-uncased"


@dataclasses.dataclass(frozen=True)
class AestheticConfig:
    """The LAION aesthetic predictor.

    Attributes:
      path: its file, which is on no Hub.
      clip: the folder of CLIP ViT-L/14, or its name on the Hub.
    """

    path: str | None = None
    clip: str = VIT_L_14


@dataclasses.dataclass(frozen=True)
class RemoteConfig:
    """A reward on another machine.

    Attributes:
      url: where it is: http://host:port/path.
      api: "scores": the one that `python -m egrpo_jax.serve` speaks; "chat": a vision model behind an
        OpenAI-compatible server, which is asked at /v1/chat/completions below `url`.
      api_key: name of the environment variable that holds the key, if it wants one.
      batch: of "scores", images in a request; "chat" sends them one by one.
      concurrency: requests at once.
      timeout: seconds for one attempt of a request.
      deadline: seconds for all scores of a call; those that have not come by then are missing.
      retries: attempts after the first, where another may do better.
      backoff: seconds before the second attempt; they double with each, up to 30.
      model: of "chat", the name under which it is served.
      max_tokens: of "chat", the longest answer.
      template: of "chat", the question: "pointwise", "axes", or a text file with {prompt} in it.
      patterns: of "chat", regular expressions, found where they occur last in the answer; the score is the mean of all
        their groups over `best`. Empty: those of a built-in template.
      best: of "chat", the highest mark.
    """

    url: str
    api: Literal["scores", "chat"] = "scores"
    api_key: str | None = None
    batch: Count = 8
    concurrency: Annotated[int, Range(1, 10_000)] = 8
    timeout: Seconds = 120.0
    deadline: Seconds = 600.0
    retries: Annotated[int, Range(0, 1000)] = 6
    backoff: Annotated[float, Range(0, 30)] = 1.0
    model: str = "UnifiedReward"
    max_tokens: Count = 1024
    template: str = "pointwise"
    patterns: tuple[str, ...] = ()
    best: Annotated[float, Range(1e-3, 10**6)] = 5.0

    def __post_init__(self) -> None:
        check(self)
        ascii_url(self.url)


@dataclasses.dataclass(frozen=True)
class ScorersConfig:
    """The config section `scorers`.

    Attributes:
      dtype: what scorers compute in.
      batch: images at once on a device.
      offload: let the scorers of the next line rest in the hosts' memory, and bring each to the devices for a call.
      hps, clip_score, pickscore, imagereward, aesthetic: where the files of these rewards are.
      remote: rewards on other machines, by the names under which `rewards` has them.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    batch: Count = 16
    offload: bool = False
    hps: HpsConfig = field(default_factory=HpsConfig)
    clip_score: ClipScoreConfig = field(default_factory=ClipScoreConfig)
    pickscore: PickScoreConfig = field(default_factory=PickScoreConfig)
    imagereward: ImageRewardConfig = field(default_factory=ImageRewardConfig)
    aesthetic: AestheticConfig = field(default_factory=AestheticConfig)
    remote: dict[str, RemoteConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self)
