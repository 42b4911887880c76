"""CLIP (Radford et al., 2021, arXiv:2103.00020) and its text encoder by itself, as pure Flax Linen modules.

`Transformer` is the stack of pre-norm blocks of both towers; a tower adds what comes before and after it.
Blocks are scanned: compile time does not grow with depth, and their parameters carry a leading layer axis.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import flax.linen as nn
import jax.numpy as jnp

from egrpo_jax.models.attention import attention
from egrpo_jax.models.layers import Dtype, LayerNorm, StackConfig, in_float32, normalise, scan_blocks, stack_flops

Activation = Literal["quick_gelu", "gelu"]


def quick_gelu(x: chex.Array) -> chex.Array:
    """OpenAI's approximation of GELU, `x * sigmoid(1.702 x)`."""
    return x * nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[Activation, Callable[[chex.Array], chex.Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": functools.partial(nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig(StackConfig):
    """Sizes of a stack of blocks, and what is between the two layers of its feed-forward parts."""

    activation: Activation


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
    """A text encoder; the defaults are CLIP-L/14, as FLUX.1 has it (123,060,480 parameters).

    Attributes:
      transformer: sizes of the stack.
      vocab_size: how many tokens there are.
      length: the longest sequence.
      eos_id: the state at the first token of this id is the pooled one; None: the state at the highest id, which is the
        end of the text in the vocabulary of CLIP.
      projection_dim: the pooled state is projected to so many channels; None: it is left as it is.
    """

    transformer: TransformerConfig = TransformerConfig(768, 12, 12, 3072, "quick_gelu")
    vocab_size: int = 49_408
    length: int = 77
    eos_id: int | None = None
    projection_dim: int | None = None


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """A vision transformer; the defaults are ViT-H/14 at 224 pixels.

    Attributes:
      transformer: sizes of the stack.
      image_size, patch_size: sides in pixels; where they do not fit, pixels at the right and the bottom are not seen.
    """

    transformer: TransformerConfig = TransformerConfig(1280, 32, 16, 5120, "gelu")
    image_size: int = 224
    patch_size: int = 14

    @property
    def tokens(self) -> int:
        """Tokens of an image: one for each patch, and one before them."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Both towers, and the dimension of the space where they meet; the defaults are ViT-H-14 (986,109,441 parameters),
    which HPSv2 and PickScore were trained from."""

    vision: ClipVisionConfig = ClipVisionConfig()
    text: ClipTextConfig = ClipTextConfig(TransformerConfig(1024, 24, 16, 4096, "gelu"))
    dim: int = 1024


class ClipTextFeatures(NamedTuple):
    """States of a text.

    Attributes:
      states: of its tokens after the final norm, `[B, L, D]`.
      pooled: the one of them at the end of the text, `[B, D]`; if there is a projection, `[B, projection_dim]`.
      penultimate: those that the last block was given, `[B, L, D]`, not normalised.
    """

    states: chex.Array
    pooled: chex.Array
    penultimate: chex.Array


class Block(nn.Module):
    """Self-attention, then a feed-forward part, each on the normalised stream and added to it.

    It is given, and passes on, the stream and what the block before was given of it.
    """

    config: TransformerConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(
        self, streams: tuple[chex.Array, chex.Array], mask: chex.Array | None
    ) -> tuple[tuple[chex.Array, chex.Array], None]:
        config, given = self.config, streams[0]
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        hidden = LayerNorm(name="attention_norm", **common)(given)
        query, key, value = (
            nn.Dense(config.width, name=name, **common)(hidden).reshape(*given.shape[:2], config.num_heads, -1)
            for name in ("to_q", "to_k", "to_v")
        )
        mixed = attention(query, key, value, mask).reshape(given.shape)
        x = given + nn.Dense(config.width, name="out", **common)(mixed)

        hidden = nn.Dense(config.mlp_dim, name="mlp_1", **common)(LayerNorm(name="mlp_norm", **common)(x))
        hidden = in_float32(ACTIVATIONS[config.activation], hidden)
        return (x + nn.Dense(config.width, name="mlp_2", **common)(hidden), given), None


class Transformer(nn.Module):
    """The stack of blocks, `[B, N, D]` to `[B, N, D]`; beside it what the last of them was given.

    Attributes:
      config: the sizes.
      dtype: what it computes in.
      param_dtype: what the parameters are stored in.
    """

    config: TransformerConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: chex.Array, mask: chex.Array | None = None) -> tuple[chex.Array, chex.Array]:
        """Transforms `x`; `mask`, boolean and broadcastable to `[B, H, N, N]`, is False where a key is not seen."""
        chex.assert_shape(x, (None, None, self.config.width))
        blocks = scan_blocks(Block, self.config.num_layers)
        return blocks(self.config, self.dtype, self.param_dtype, name="blocks")((x, x), mask)[0]


class ClipText(nn.Module):
    """CLIP's text encoder, with a projection if the config has one.

    Attributes:
      config: the sizes.
      dtype: what it computes in and returns.
      param_dtype: what the parameters are stored in.
    """

    config: ClipTextConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: chex.Array) -> ClipTextFeatures:
        """Encodes token `ids [B, L]`; tokens see those before them, padding is not masked.

        Raises:
          ValueError: L is above `config.length`.
        """
        config = self.config
        chex.assert_rank(ids, 2)
        length = ids.shape[1]
        if length > config.length:
            raise ValueError(f"{length} tokens, but there are positions for {config.length}")
        width = config.transformer.width
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        x = nn.Embed(config.vocab_size, width, name="tokens", **common)(ids)
        positions = self.param("positions", nn.initializers.normal(0.01), (config.length, width), self.param_dtype)
        x = x + positions[:length].astype(self.dtype)
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        x, penultimate = Transformer(config.transformer, name="transformer", **common)(x, causal)
        states = LayerNorm(name="final_norm", **common)(x)
        last = end_positions(ids, config.eos_id)
        pooled = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
        if config.projection_dim is not None:
            pooled = nn.Dense(config.projection_dim, use_bias=False, name="text_projection", **common)(pooled)
        return ClipTextFeatures(states, pooled, penultimate)


class ClipVision(nn.Module):
    """CLIP's vision transformer, without a projection.

    Attributes:
      config: the sizes.
      dtype: what it computes in and returns.
      param_dtype: what the parameters are stored in.
    """

    config: ClipVisionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: chex.Array) -> chex.Array:
        """The state `[B, D]` that gathers what is in `images [B, image_size, image_size, 3]`, normalised as CLIP's."""
        config = self.config
        chex.assert_shape(images, (None, config.image_size, config.image_size, 3))
        width, patch = config.transformer.width, (config.patch_size, config.patch_size)
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        init = nn.initializers.normal(0.02)

        x = nn.Conv(width, patch, patch, padding="VALID", use_bias=False, name="patches", **common)(images)
        first = self.param("class_token", init, (width,), self.param_dtype).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, width)), x.reshape(len(x), -1, width)], axis=1)
        x = x + self.param("positions", init, (config.tokens, width), self.param_dtype).astype(self.dtype)
        x = LayerNorm(name="first_norm", **common)(x)
        x, _ = Transformer(config.transformer, name="transformer", **common)(x)
        return LayerNorm(name="final_norm", **common)(x[:, 0])


class Clip(nn.Module):
    """Images and texts in one space, where cosines say how well they fit.

    Attributes:
      config: the sizes.
      dtype: what it computes in.
      param_dtype: what the parameters are stored in.
    """

    config: ClipConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """Makes both towers and their projections."""
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.vision = ClipVision(self.config.vision, **common)
        self.text = ClipText(self.config.text, **common)
        self.image_projection = nn.Dense(self.config.dim, use_bias=False, **common)
        self.text_projection = nn.Dense(self.config.dim, use_bias=False, **common)
        # In float32 always: what rounds the logarithm of 100 moves 100 by a percent.
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(math.log(1 / 0.07)), (), jnp.float32)

    def __call__(self, images: chex.Array, ids: chex.Array) -> chex.Array:
        """Logits `[B]`, float32: cosines of images and texts `ids` in the same row, times `exp(logit_scale)`."""
        return jnp.exp(self.logit_scale) * (self.encode_images(images) * self.encode_text(ids)).sum(-1)

    def encode_images(self, images: chex.Array) -> chex.Array:
        """Unit vectors `[B, dim]`, float32, of `images [B, image_size, image_size, 3]`, normalised as CLIP's."""
        return normalise(self.image_projection(self.vision(images)).astype(jnp.float32))

    def encode_text(self, ids: chex.Array) -> chex.Array:
        """Unit vectors `[B, dim]`, float32, of token `ids [B, L]`."""
        return normalise(self.text_projection(self.text(ids).pooled).astype(jnp.float32))


class LinearHead(nn.Module):
    """Linear layers of `widths`, one after another with nothing between; computes in float32."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        for index, width in enumerate(self.widths):
            x = nn.Dense(width, precision="highest", name=f"layer_{index}")(x)
        return x


def end_positions(ids: chex.Array, eos_id: int | None) -> chex.Array:
    """Ends `[B]` of `ids [B, L]`: at the first `eos_id`, or, if that is None, at the first highest id."""
    return jnp.argmax(ids if eos_id is None else ids == eos_id, axis=-1)


def image_flops(config: ClipConfig) -> int:
    """Floating-point operations of an image's vector; lookups and norms cost none."""
    vision, width = config.vision, config.vision.transformer.width
    patches = 2 * (vision.tokens - 1) * vision.patch_size**2 * 3 * width
    return patches + stack_flops(vision.transformer, vision.tokens) + 2 * width * config.dim
