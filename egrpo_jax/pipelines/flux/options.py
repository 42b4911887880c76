"""Options of FLUX.1."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Count, Range, check
from egrpo_jax.models.attention import Backend
from egrpo_jax.models.layers import Remat
from egrpo_jax.models.lora import LoraConfig

Dtype = Literal["bfloat16", "float32"]
Pixels = Annotated[int, Range(16, 16_384, multiple_of=16)]

FLOW_GRPO_TARGETS = (
    r"double_blocks/(image|text)_qkv/to_[qkv]$",
    r"double_blocks/(image|text)_out$",
    r"double_blocks/(image|text)_ff/linear_[12]$",
    r"single_blocks/qkv/to_[qkv]$",
)
"""Flow-GRPO, FLUX: its 12 published names end in `attn.to_q`, ..., which are names in the single blocks too."""
DANCE_GRPO_TARGETS = (
    r"double_blocks/image_qkv/to_[qkv]$",
    r"double_blocks/image_out$",
    r"single_blocks/qkv/to_[qkv]$",
)
"""DanceGRPO, FLUX: every layer whose published name ends in `to_q`, `to_k`, `to_v` or `to_out.0`."""


@dataclasses.dataclass(frozen=True)
class FluxLora(LoraConfig):
    """The config section `model.flux.lora`; the defaults are Flow-GRPO's."""

    targets: tuple[str, ...] = FLOW_GRPO_TARGETS


FLOW_GRPO = FluxLora()
DANCE_GRPO = FluxLora(DANCE_GRPO_TARGETS, rank=128, alpha=256.0)


@dataclasses.dataclass(frozen=True)
class FluxOptions:
    """The config section `model.flux`.

    Attributes:
      height, width: of the images, in pixels.
      guidance: the distilled guidance scale, an input of FLUX.1-dev; FLUX.1-schnell has none.
      text_tokens: length of the T5 sequence; padding is attended to, so that it must be what the model was trained
        with: 512 (dev) or 256 (schnell).
      transformer: other weights for the transformer: a diffusers folder, a single file in the BFL layout, or what
        `convert --to orbax` wrote.
      embeddings: a folder that `encode` made; then no text encoder is loaded.
      offload_encoders: let the text encoders rest in the hosts' memory, and bring them to the devices for a call.
      lora: adapters to train; None trains all weights of the transformer.
      lora_weights: start from the adapters in this file, with its layers and ranks, instead of fresh ones.
      int8_base: store the kernels of the transformer's blocks, to which adapters are trained, as int8 with a scale for
        each output channel; layers read them in `dtype`.
      dtype: what the models compute in.
      param_dtype: what the trained weights are stored in; weights that are not trained are stored in `dtype`.
      decode_dtype: what the VAE decoder computes and is stored in.
      decode_batch: images decoded at once on a device.
      decode_tile: decode in overlapping tiles of so many rows and columns of latents, for large images.
      remat: what the backward pass computes again instead of keeping it.
      attention: what computes the transformer's attention; `auto` is the fused kernel of the GPU or TPU where it fits,
        and `xla` elsewhere.
      truncate_time: cut the model's time input to thousandths, as the PyTorch trainers do.
    """

    height: Pixels = 720
    width: Pixels = 720
    guidance: Annotated[float, Range(0, 1000)] = 3.5
    text_tokens: Annotated[int, Range(1, 100_000)] = 512
    transformer: str | None = None
    embeddings: str | None = None
    offload_encoders: bool = False
    lora: FluxLora | None = None
    lora_weights: str | None = None
    int8_base: bool = False
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    decode_dtype: Dtype = "float32"
    decode_batch: Count = 4
    decode_tile: Annotated[int, Range(4, 4096, multiple_of=4)] | None = None
    remat: Remat = "blocks"
    attention: Backend = "auto"
    truncate_time: bool = False

    def __post_init__(self) -> None:
        check(self)
        if self.lora_weights is not None and self.lora is None:
            raise ConfigError("lora_weights", self.lora_weights, "lora to be set too, with rank and alpha")
        if self.int8_base and self.lora is None:
            raise ConfigError("int8_base", True, "lora to be set too: int8 is for weights that are not trained")


def lighter(options: FluxOptions) -> Iterator[dict[str, Any]]:
    """Options that take less memory than `options`, those that cost least first."""
    adapters = {} if options.lora else {"lora": FLOW_GRPO}
    yield {"decode_batch": 1}
    yield adapters
    yield adapters | {"int8_base": True}
