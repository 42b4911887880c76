"""The config section `scorers`: where the built-in rewards find their files and servers."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Literal

from egrpo_jax.config import ConfigError

VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_L_14 = "openai/clip-vit-large-patch14"


@dataclasses.dataclass(frozen=True)
class HpsConfig:
    """HPSv2: its file, the folder that holds it, or its name on the Hub; and a folder with CLIP's tokenizer."""

    path: str = "xswu/HPSv2"
    tokenizer: str = VIT_H_14


@dataclasses.dataclass(frozen=True)
class ClipScoreConfig:
    """The CLIP score: a folder as open_clip or transformers publish it, or its name on the Hub."""

    path: str = VIT_H_14


@dataclasses.dataclass(frozen=True)
class PickScoreConfig:
    """PickScore: its folder, or its name on the Hub."""

    path: str = "yuvalkirstain/PickScore_v1"


@dataclasses.dataclass(frozen=True)
class ImageRewardConfig:
    """ImageReward: its file or folder, and a folder with BERT's `vocab.txt`; or their names on the Hub."""

    path: str = "THUDM/ImageReward"
    tokenizer: str = "google-bert/bert-base-uncased"


@dataclasses.dataclass(frozen=True)
class AestheticConfig:
    """The LAION aesthetic predictor: its file, which is on no Hub, and the folder of CLIP ViT-L/14."""

    path: str | None = None
    clip: str = VIT_L_14


@dataclasses.dataclass(frozen=True)
class RemoteConfig:
    """A scorer on another machine."""

    url: str


@dataclasses.dataclass(frozen=True)
class ScorersConfig:
    """The config section `scorers`.

    Attributes:
      dtype: what scorers compute in.
      batch: images at once on a device.
      remote: scorers on other machines, by the names under which `rewards` has them.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    batch: int = 16
    hps: HpsConfig = field(default_factory=HpsConfig)
    clip_score: ClipScoreConfig = field(default_factory=ClipScoreConfig)
    pickscore: PickScoreConfig = field(default_factory=PickScoreConfig)
    imagereward: ImageRewardConfig = field(default_factory=ImageRewardConfig)
    aesthetic: AestheticConfig = field(default_factory=AestheticConfig)
    remote: dict[str, RemoteConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ConfigError("batch", self.batch, "at least 1")
