"""BLIP with a scalar head, which is ImageReward (Xu et al., 2023, arXiv:2304.05977), as pure Flax Linen modules.

BLIP is Li et al., 2022 (arXiv:2201.12086): a vision transformer of pre-norm blocks, and BERT, of post-norm blocks, that
have between self-attention and feed-forward part attention to the states of the image.
Blocks are scanned: compile time does not grow with depth, and their parameters carry a leading layer axis.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import chex
import flax.linen as nn
import jax.numpy as jnp

from egrpo_jax.models.attention import attention
from egrpo_jax.models.layers import Dtype, LayerNorm, StackConfig, in_float32, scan_blocks, stack_flops

SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072
"""Of the head's outputs over ImageReward's test prompts: what makes scores about N(0, 1)."""

_VISION_EPSILON, _TEXT_EPSILON = 1e-6, 1e-12
_VIT_L, _BERT_BASE = StackConfig(1024, 24, 16, 4096), StackConfig(768, 12, 12, 3072)


@dataclasses.dataclass(frozen=True)
class BlipConfig:
    """A model that scores an image for a text; the defaults are ImageReward v1.0 (446,206,689 parameters).

    Attributes:
      vision: the vision transformer, ViT-L.
      text: the text encoder, BERT-base.
      image_size, patch_size: sides in pixels.
      vocab_size: how many tokens there are.
      length: the longest text, in tokens.
      head: widths of the linear layers that make the score, one after another with nothing between.
    """

    vision: StackConfig = _VIT_L
    text: StackConfig = _BERT_BASE
    image_size: int = 224
    patch_size: int = 16
    vocab_size: int = 30_524
    length: int = 512
    head: tuple[int, ...] = (1024, 128, 64, 16, 1)

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} must divide image_size {self.image_size}")

    @property
    def image_tokens(self) -> int:
        """Tokens of an image: one for each patch, and one before them."""
        return (self.image_size // self.patch_size) ** 2 + 1


class Attention(nn.Module):
    """Attention of a stream to itself or to another, with the linear layers around it."""

    num_heads: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: chex.Array, context: chex.Array, mask: chex.Array | None = None) -> chex.Array:
        """`[B, N, D]`, of queries from `x [B, N, D]`, keys and values from `context [B, M, C]`."""
        width = x.shape[-1]
        query, key, value = (
            self._linear(width, name)(source).reshape(*source.shape[:2], self.num_heads, -1)
            for name, source in (("to_q", x), ("to_k", context), ("to_v", context))
        )
        return self._linear(width, "out")(attention(query, key, value, mask).reshape(x.shape))

    def _linear(self, width: int, name: str) -> nn.Dense:
        return nn.Dense(width, dtype=self.dtype, param_dtype=self.param_dtype, name=name)


class FeedForward(nn.Module):
    """Two linear layers and the exact GELU between them."""

    inner: int
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        common = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        hidden = in_float32(functools.partial(nn.gelu, approximate=False), nn.Dense(self.inner, name="in", **common)(x))
        return nn.Dense(x.shape[-1], name="out", **common)(hidden)


class VisionBlock(nn.Module):
    """Self-attention, then a feed-forward part, each on the normalised stream and added to it."""

    config: StackConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: chex.Array) -> tuple[chex.Array, None]:
        config, common = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        hidden = LayerNorm(_VISION_EPSILON, name="attention_norm", **common)(x)
        x = x + Attention(config.num_heads, name="attention", **common)(hidden, hidden)
        hidden = LayerNorm(_VISION_EPSILON, name="mlp_norm", **common)(x)
        return x + FeedForward(config.mlp_dim, name="mlp", **common)(hidden), None


class TextBlock(nn.Module):
    """Self-attention, attention to the image, feed-forward part, each added to the stream, which is then normalised."""

    config: StackConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: chex.Array, image: chex.Array, mask: chex.Array) -> tuple[chex.Array, None]:
        config, common = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        mixed = Attention(config.num_heads, name="attention", **common)(x, x, mask)
        x = LayerNorm(_TEXT_EPSILON, name="attention_norm", **common)(x + mixed)
        mixed = Attention(config.num_heads, name="image_attention", **common)(x, image)
        x = LayerNorm(_TEXT_EPSILON, name="image_attention_norm", **common)(x + mixed)
        hidden = FeedForward(config.mlp_dim, name="mlp", **common)(x)
        return LayerNorm(_TEXT_EPSILON, name="mlp_norm", **common)(x + hidden), None


class BlipVision(nn.Module):
    """The vision transformer: `[B, image_size, image_size, 3]`, normalised, to states `[B, image_tokens, D]`."""

    config: BlipConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, images: chex.Array) -> chex.Array:
        config, common = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        width, patch = config.vision.width, (config.patch_size, config.patch_size)
        chex.assert_shape(images, (None, config.image_size, config.image_size, 3))
        init = nn.initializers.normal(0.02)

        x = nn.Conv(width, patch, patch, padding="VALID", name="patches", **common)(images.astype(self.dtype))
        first = self.param("class_token", init, (1, width), self.param_dtype).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(images), 1, width)), x.reshape(len(images), -1, width)], 1)
        x = x + self.param("positions", init, (config.image_tokens, width), self.param_dtype).astype(self.dtype)
        x, _ = scan_blocks(VisionBlock, config.vision.num_layers)(config.vision, name="blocks", **common)(x)
        return LayerNorm(_VISION_EPSILON, name="final_norm", **common)(x)


class BlipText(nn.Module):
    """The text encoder that sees an image: ids `[B, L]`, mask `[B, L]` and image states to states `[B, L, D]`."""

    config: BlipConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, ids: chex.Array, mask: chex.Array, image: chex.Array) -> chex.Array:
        config, common = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        length, width = ids.shape[1], config.text.width
        if length > config.length:
            raise ValueError(f"{length} tokens, but there are positions for {config.length}")

        x = nn.Embed(config.vocab_size, width, name="tokens", **common)(ids)
        positions = self.param("positions", nn.initializers.normal(0.02), (config.length, width), self.param_dtype)
        x = LayerNorm(_TEXT_EPSILON, name="first_norm", **common)(x + positions[:length].astype(self.dtype))
        blocks = scan_blocks(TextBlock, config.text.num_layers)(config.text, name="blocks", **common)
        return blocks(x, image, mask[:, None, None, :])[0]


class Blip(nn.Module):
    """Scores images for texts.

    Attributes:
      config: the sizes.
      dtype: what the towers compute in; the head computes in float32.
      param_dtype: what the parameters are stored in.
    """

    config: BlipConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, images: chex.Array, ids: chex.Array, mask: chex.Array) -> chex.Array:
        """Scores `[B]`, float32, about N(0, 1) over common images, higher is better.

        Args:
          images: `[B, image_size, image_size, 3]`, normalised as CLIP's.
          ids: tokens `[B, L]`, the first of which gathers the score.
          mask: boolean `[B, L]`, False where a token is padding.

        Raises:
          ValueError: L is above `config.length`.
        """
        chex.assert_equal_shape([ids, mask])
        towers = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        states = BlipVision(self.config, name="vision", **towers)(images)
        x = BlipText(self.config, name="text", **towers)(ids, mask, states)[:, 0].astype(jnp.float32)
        for index, width in enumerate(self.config.head):
            x = nn.Dense(width, jnp.float32, param_dtype=self.param_dtype, name=f"head_{index}")(x)
        return (x[:, 0] - SCORE_MEAN) / SCORE_STD


def forward_flops(config: BlipConfig, tokens: int) -> int:
    """Floating-point operations of one score with a text of `tokens`; lookups and norms cost none."""
    image, vision, text = config.image_tokens, config.vision, config.text
    patches = 2 * (image - 1) * config.patch_size**2 * 3 * vision.width
    # Attention to the image: query and output of each token, key and value of each image token, and their products.
    linear = 4 * tokens * text.width**2 + 4 * image * vision.width * text.width
    to_image = text.num_layers * (linear + 4 * tokens * image * text.width)
    head = sum(2 * inner * outer for inner, outer in itertools.pairwise((text.width, *config.head)))
    return patches + stack_flops(vision, image) + stack_flops(text, tokens) + to_image + head
