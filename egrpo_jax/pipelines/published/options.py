"""Options of published models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.common.ranges import Count, Range, check
from egrpo_jax.models.attention import Backend
from egrpo_jax.models.layers import Remat
from egrpo_jax.models.lora import LoraConfig

Dtype = Literal["bfloat16", "float32"]
Pixels = Annotated[int, Range(16, 16_384, multiple_of=16)]


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """The config section `model.published.lora`.

    Attributes:
      targets: regular expressions; a dense layer is adapted if one is found in its path, as `double_blocks/image_out`;
        or names of sets of layers that the family of the model has, as "flow_grpo" (docs/models.md). Empty: the first
        of these sets.
      rank: r, of each adapter.
      alpha: the adapter's output is multiplied by `alpha / rank`.
    """

    targets: tuple[str, ...] = ()
    rank: Annotated[int, Range(1, 100_000)] = 64
    alpha: Annotated[float, Range(1e-3, 10**6)] = 128.0

    def __post_init__(self) -> None:
        self.adapters({"": ("",)})

    def adapters(self, presets: Mapping[str, tuple[str, ...]]) -> LoraConfig:
        """The adapters of a family with these sets of layers.

        Raises:
          ConfigError: a target is no regular expression, or a number is out of its range.
        """
        targets = (pattern for name in self.targets or tuple(presets)[:1] for pattern in presets.get(name, (name,)))
        return LoraConfig(tuple(targets), self.rank, self.alpha)


FLOW_GRPO = LoraOptions(("flow_grpo",))
DANCE_GRPO = LoraOptions(("dance_grpo",), rank=128, alpha=256.0)


@dataclasses.dataclass(frozen=True)
class PublishedOptions:
    """The config section `model.published`.

    Attributes:
      height, width: of the images, in pixels.
      guidance: the scale of guidance. For FLUX.1-dev it is an input. Other models are guided away from `negative`, by
        two forward passes for one, unless the scale says that they are not: docs/models.md has the published value of
        each model, which None stands for. FLUX.1-schnell has none.
      negative: the prompt that is guided away from.
      text_tokens: length of the sequence of text; padding is attended to, so that it must be what the model was trained
        with, the published value, which None stands for: 512 (FLUX.1-dev) or 256 (FLUX.1-schnell), of T5 alone.
      transformer: other weights for the transformer: a diffusers folder, a single file in the original layout, or what
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
    guidance: Annotated[float, Range(0, 1000)] | None = None
    negative: str = ""
    text_tokens: Annotated[int, Range(1, 100_000)] | None = None
    transformer: str | None = None
    embeddings: str | None = None
    offload_encoders: bool = False
    lora: LoraOptions | None = None
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


def lighter(options: PublishedOptions) -> Iterator[dict[str, Any]]:
    """Options that take less memory than `options`, those that cost least first."""
    adapters = {} if options.lora else {"lora": LoraOptions()}
    yield {"decode_batch": 1}
    yield adapters
    yield adapters | {"int8_base": True}
