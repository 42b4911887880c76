"""The record of a model family: all that its transformers and their pipelines have to themselves."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from egrpo_jax.flow.grid import Times
from egrpo_jax.models.vae import VaeConfig
from egrpo_jax.parallel.rules import INTO_TENSOR, OUT_OF_TENSOR, Rules
from egrpo_jax.pipelines.families.schedule import scheduled_times
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.layout import Layout
from egrpo_jax.weights.published.vae import CLASS_NAME as KL

Arrays = tuple[chex.Array, ...]

_KERNEL = r"/kernel(/values)?$"  # the scales of kernels in int8 are small, and replicated
PUBLISHED_RULES: Rules = (
    (rf"(^|/)flow/.*(out|(ff|_in)/linear_2){_KERNEL}", OUT_OF_TENSOR),
    (r"(^|/)(t5|qwen)/.*(out|mlp_out)/kernel$", OUT_OF_TENSOR),
    (rf"(^|/)(flow|t5|qwen)/.*{_KERNEL}", INTO_TENSOR),
    (r"(^|/)(t5|qwen)/tokens/embedding$", PartitionSpec("tensor", "fsdp")),
    # Adapters split the axis that they share with the layer they adapt.
    (r"(^|/)lora/.*/a$", PartitionSpec("fsdp", None)),
    (r"(^|/)lora/.*/b$", PartitionSpec(None, "fsdp")),
)
"""For a transformer under `flow`, whose layers that write the residual stream are called `..out` or `..ff/linear_2`,
its adapters, T5 and Qwen3. CLIP and the VAE, below 1 B parameters, are replicated. The moments of the optimizer and
averages lie as their parameters do."""


@dataclasses.dataclass(frozen=True)
class Format:
    """A form in which weights of a transformer are published.

    Attributes:
      layout: its tensors, for given sizes.
      marker: a pattern found in the name of a tensor, by which files are of this form.
      ignored: patterns of whole names that may be there and hold no parameter.
    """

    layout: Callable[[Any], Layout]
    marker: str = ""
    ignored: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A text encoder of a pipeline's folder, sizes and tokenizer read, weights not.

    Attributes:
      module: makes it, of the dtype that it computes in.
      folder: of its weights.
      layout: its tensors, by the names that are in the files.
      tokenize: B prompts to its arguments, arrays with leading axis B.
      ignored: patterns of whole names that may be in the files and hold no parameter.
    """

    module: Callable[[Any], nn.Module]
    folder: Path
    layout: Callable[[Iterable[str]], Layout]
    tokenize: Callable[[Sequence[str]], Arrays]
    ignored: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class Text:
    """The text encoders of a family. `Any` is the family's own config of sizes, or, of `conditioning`, a dtype.

    Attributes:
      parts: the folders of encoders and tokenizers in a pipeline's.
      tokens: the published value of the option `text_tokens`, by sizes.
      conditioning: that of one prompt as `jax.ShapeDtypeStruct`, a NamedTuple with a field `text [L, D]`, by sizes,
        `text_tokens` and a dtype.
      read: the encoders, by name, of a pipeline's folder, by sizes and `text_tokens`; raises UserError where parts are
        missing or do not fit one another.
      join: the conditioning of what they give for B prompts, and of their arguments, both by their names.
      modules: the published ones, by name, as they are made of a dtype, by sizes: for the memory that they take.
    """

    parts: Sequence[str]
    tokens: Callable[[Any], int]
    conditioning: Callable[[Any, int, Any], Any]
    read: Callable[[Path, Any, int], Mapping[str, TextEncoder]]
    join: Callable[[Mapping[str, Any], Mapping[str, Arrays]], Any]
    modules: Callable[[Any], Mapping[str, Callable[[Any], nn.Module]]]


@dataclasses.dataclass(frozen=True)
class Family:
    """The transformers of one architecture, and the pipelines that they are published in.

    Their modules are called as `module(latents, time, **conditioning, grid=grid)`, with `guidance` too where it is
    embedded, and give the velocity noise - data. `Any` below is the family's own config of sizes.

    Attributes:
      name: in words.
      class_name: of its transformer, in config.json.
      releases: the sizes of published models, by a pattern found in the name of one, in small letters: for what is told
        of a model whose files are not here. The first that fits counts.
      read_sizes, write_sizes: config.json to sizes and back; raise UserError.
      formats: of the transformer's weights, by name, "diffusers" first.
      module: the transformer, as `module(sizes, dtype, remat=..., attention=...)`.
      forward_flops: of a velocity, by sizes, image tokens and text tokens.
      token_channels: D of the latents.
      text: its text encoders.
      vae: the sizes of the published autoencoder, whose class is `vae_class`.
      times: the published time grid, by the scheduler's keys, image tokens and steps.
      embeds_guidance: tells whether the guidance scale is an input.
      guidance: its published value, by sizes and the pipeline's model_index.json; None: these do not tell.
      unguided: the guidance at which a model without that input is not guided; None: it never is.
      max_side: the largest side of an image in tokens; None for any.
      max_text: the largest `text_tokens`; None for any.
      rules: how the parameters are sharded: those of the transformer under `flow`, of text encoders under their names.
      blocks: a pattern of the transformer's kernels that can be stored as int8.
      constants: a pattern of its parameters that are not trained, from the start of their paths; None if all are.
      presets: patterns of the layers that adapters are published for, by name; the first is the default.
    """

    name: str
    class_name: str
    releases: Mapping[str, Any]
    read_sizes: Callable[[Published], Any]
    write_sizes: Callable[[Any], dict[str, Any]]
    formats: dict[str, Format]
    module: Callable[..., nn.Module]
    forward_flops: Callable[[Any, int, int], int]
    token_channels: Callable[[Any], int]
    text: Text
    vae: VaeConfig
    rules: Rules
    blocks: str
    presets: Mapping[str, tuple[str, ...]]
    guidance: Callable[[Any, Mapping[str, Any]], float | None]
    unguided: float | None = None
    embeds_guidance: Callable[[Any], bool] = lambda _: False
    times: Callable[[Published, int, int], Times] = scheduled_times
    max_side: Callable[[Any], int | None] = lambda _: None
    max_text: Callable[[Any], int | None] = lambda _: None
    constants: str | None = None
    vae_class: str = KL

    def format_of(self, names: Iterable[str]) -> Format:
        """The format of a file with tensors of these names."""
        present = list(names)
        fits = lambda found: any(re.search(found.marker, name) for name in present)
        return next(filter(fits, reversed(self.formats.values())), self.formats["diffusers"])

    def shapes(self, sizes: Any) -> dict[str, Any]:
        """The parameters of a transformer, as `jax.ShapeDtypeStruct` of float32."""
        prompt = self.text.conditioning(sizes, 1, jnp.float32)._asdict()

        def init() -> Any:
            inputs: dict[str, Any] = {name: jnp.zeros((1, *leaf.shape), leaf.dtype) for name, leaf in prompt.items()}
            if self.embeds_guidance(sizes):
                inputs["guidance"] = jnp.zeros(1)
            latents = jnp.zeros((1, 1, self.token_channels(sizes)))
            return self.module(sizes).init(jax.random.key(0), latents, jnp.zeros(1), **inputs, grid=(1, 1))

        return jax.eval_shape(init)["params"]
