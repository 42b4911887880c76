"""The decoders of the autoencoders of FLUX.1, FLUX.2 and SD3.5 as pure Flax Linen modules, and their latents.

The architecture is that of `AutoencoderKL` in diffusers without quantisation convolutions, or of `AutoencoderKLFlux2`;
reinforcement learning only decodes. Images are `[B, height, width, 3]`, latents `[B, h, w, C]` with h = height / 8 and
w = width / 8, and the flow model sees 2x2 patches of latents, scaled, as tokens: `Vae.unpack`. `micro_batched` and
`tiled` wrap a decoder to bound its memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.models.attention import attention
from egrpo_jax.models.layers import Dtype


@dataclasses.dataclass(frozen=True)
class VaeConfig:
    """Sizes of an autoencoder, named as in the published config.json; the defaults are FLUX.1, whose decoder has
    49,545,475 parameters.

    Attributes:
      block_out_channels: width of each level of the decoder, full resolution first; every further one has half the
        height and width.
      layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
      latent_channels: C of the latents.
      norm_num_groups: groups of every group norm.
      scaling_factor, shift_factor: the flow model's latents are `(z - shift_factor) * scaling_factor`.
      use_post_quant_conv: the decoder begins with a linear layer over the channels of latents.
      batch_norm_eps: if set, the flow model's tokens are scaled by a mean and a variance of each channel instead, which
        are parameters; this is added to the variance.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 16
    norm_num_groups: int = 32
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    use_post_quant_conv: bool = False
    batch_norm_eps: float | None = None

    def __post_init__(self) -> None:
        if any(channels % self.norm_num_groups for channels in self.block_out_channels):
            raise ValueError(
                f"norm_num_groups {self.norm_num_groups} must divide block_out_channels {self.block_out_channels}"
            )

    @property
    def stride(self) -> int:
        """Rows of pixels for each row of latents."""
        return 2 ** (len(self.block_out_channels) - 1)


class _Part(nn.Module):
    """Base of the decoder's parts: the layers that they are made of."""

    config: VaeConfig
    dtype: Dtype
    param_dtype: Dtype

    def conv(self, channels: int, name: str) -> nn.Conv:
        """A 3x3 convolution."""
        return nn.Conv(channels, (3, 3), padding=1, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    def dense(self, channels: int, name: str) -> nn.Dense:
        """A linear layer over channels, which is also a 1x1 convolution."""
        return nn.Dense(channels, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    def norm(self, name: str) -> nn.GroupNorm:
        """Group norm in float32, the following SiLU too: they fuse, and the next layer rounds its input once."""
        return nn.GroupNorm(
            self.config.norm_num_groups,
            epsilon=1e-6,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
            use_fast_variance=False,  # E[x^2] - E[x]^2 cancels
            name=name,
        )

    @property
    def common(self) -> dict[str, Any]:
        """The attributes that a part hands to its own parts."""
        return {"config": self.config, "dtype": self.dtype, "param_dtype": self.param_dtype}


class Resnet(_Part):
    """A residual block of two convolutions, `[B, h, w, *]` to `[B, h, w, channels]`."""

    channels: int

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        hidden = self.conv(self.channels, "conv_1")(nn.silu(self.norm("norm_1")(x)))
        hidden = self.conv(self.channels, "conv_2")(nn.silu(self.norm("norm_2")(hidden)))
        return hidden + (x if x.shape[-1] == self.channels else self.dense(self.channels, "shortcut")(x))


class Level(_Part):
    """`count` residual blocks at one resolution."""

    channels: int
    count: int

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        for index in range(self.count):
            x = Resnet(channels=self.channels, name=f"resnet_{index}", **self.common)(x)
        return x


class SelfAttention(_Part):
    """Residual attention over all places of `[B, h, w, D]`, with one head."""

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        batch, height, width, channels = x.shape
        hidden = self.norm("norm")(x).reshape(batch, height * width, channels)
        query, key, value = (self.dense(channels, name)(hidden)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        return x + self.dense(channels, "out")(attention(query, key, value).reshape(x.shape))


class Middle(_Part):
    """The lowest resolution: residual block, attention, residual block."""

    @nn.compact
    def __call__(self, x: chex.Array) -> chex.Array:
        x = Resnet(channels=x.shape[-1], name="resnet_0", **self.common)(x)
        x = SelfAttention(name="attention", **self.common)(x)
        return Resnet(channels=x.shape[-1], name="resnet_1", **self.common)(x)


class Decoder(_Part):
    """Latents `[B, h, w, C]` to images `[B, height, width, 3]`; level 0 is the lowest resolution."""

    @nn.compact
    def __call__(self, latents: chex.Array) -> chex.Array:
        levels = self.config.block_out_channels[::-1]
        if self.config.use_post_quant_conv:
            latents = self.dense(self.config.latent_channels, "post_quant")(latents)
        x = Middle(name="middle", **self.common)(self.conv(levels[0], "conv_in")(latents))
        for index, channels in enumerate(levels):
            x = Level(channels=channels, count=self.config.layers_per_block + 1, name=f"up_{index}", **self.common)(x)
            if index < len(levels) - 1:
                x = self.conv(channels, f"upsample_{index}")(x.repeat(2, axis=1).repeat(2, axis=2))
        return self.conv(3, "conv_out")(nn.silu(self.norm("norm_out")(x)))


class Vae(nn.Module):
    """The autoencoder as far as it is needed: its decoder, and the scale of its latents.

    Parameters are under `decoder`, as in the published tensors; `latent_mean` and `latent_variance`, both `[4 C]`, are
    beside it if `config.batch_norm_eps` is set.

    Attributes:
      config: the sizes.
      dtype: what it computes in; images are returned in float32.
      param_dtype: what the parameters are stored in.
    """

    config: VaeConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        """The parts, whichever method is called: initialising by `decode` gives the statistics too."""
        self.decoder = Decoder(self.config, self.dtype, self.param_dtype)
        if self.config.batch_norm_eps is not None:
            like = ((4 * self.config.latent_channels,), self.param_dtype)
            self.latent_mean = self.param("latent_mean", nn.initializers.zeros, *like)
            self.latent_variance = self.param("latent_variance", nn.initializers.ones, *like)

    def unpack(self, tokens: chex.Array, grid: tuple[int, int]) -> chex.Array:
        """Unscaled latents `[B, h, w, C]` of the tokens `[B, N, 4 C]` that a flow model makes; see `unpack_latents`."""
        if self.config.batch_norm_eps is None:
            unscaled = tokens / self.config.scaling_factor + self.config.shift_factor
        else:
            deviation = jnp.sqrt(self.latent_variance.astype(jnp.float32) + self.config.batch_norm_eps)
            unscaled = tokens * deviation + self.latent_mean
        return unpack_latents(unscaled, grid)

    def decode(self, latents: chex.Array) -> chex.Array:
        """Images `[B, height, width, 3]`, about [-1, 1] but not clipped, of unscaled `latents [B, h, w, C]`."""
        chex.assert_shape(latents, (None, None, None, self.config.latent_channels))
        return self.decoder(latents).astype(jnp.float32)


def unpack_latents(tokens: chex.Array, grid: tuple[int, int]) -> chex.Array:
    """Latents `[B, h, w, C]` of tokens `[B, N, 4 C]`, row-major on a `grid` of (rows, columns) of 2x2 patches.

    Channel 4c + 2i + j of a token is channel c at place (i, j) of its patch.
    """
    rows, columns = grid
    chex.assert_shape(tokens, (None, rows * columns, None))
    patches = tokens.reshape(tokens.shape[0], rows, columns, -1, 2, 2)
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(tokens.shape[0], 2 * rows, 2 * columns, -1)


Decode = Callable[[chex.Array], chex.Array]
"""A decoder with its parameters: unscaled latents `[B, h, w, C]` to images `[B, height, width, 3]` in [-1, 1]."""


def latents_to_images(decode: Decode, latents: chex.Array) -> chex.Array:
    """Images `[B, height, width, 3]`, clipped to [0, 1], of unscaled `latents [B, h, w, C]`, as `Vae.unpack` gives."""
    return jnp.clip(decode(latents) / 2 + 0.5, 0, 1)


def micro_batched(decode: Decode, size: int) -> Decode:
    """`decode`, applied to `size` of its inputs at a time; `size` need not divide their number."""
    return lambda latents: jax.lax.map(lambda one: decode(one[None])[0], latents, batch_size=size)


def tiled(decode: Decode, tile: int) -> Decode:
    """`decode` for images too large to be decoded at once: tiles that overlap by a quarter, blended linearly.

    The same tiles and weights as `enable_tiling` of diffusers. Group norm and attention see one tile each, hence the
    image differs from that of `decode`; latents not larger than `tile` are left to `decode`. Tiles at the edges are
    smaller: up to four shapes, each compiled once if `decode` is jitted.

    Args:
      decode: `[B, h, w, C]` to `[B, height, width, 3]`.
      tile: rows and columns of a tile of latents, a multiple of 4; 128 are 1024 pixels of FLUX.1, as in diffusers.

    Raises:
      ValueError: `tile` is no positive multiple of 4.
    """
    if tile <= 0 or tile % 4:
        raise ValueError(f"tile {tile} must be a positive multiple of 4")
    step = tile * 3 // 4

    def decode_tiles(latents: chex.Array) -> chex.Array:
        _, height, width, _ = latents.shape
        if max(height, width) <= tile:
            return decode(latents)
        tiles = [
            [decode(latents[:, top : top + tile, left : left + tile]) for left in range(0, width, step)]
            for top in range(0, height, step)
        ]
        stride = tiles[0][0].shape[1] // min(tile, height)
        return _join_tiles(tiles, kept=stride * step, overlap=stride * (tile - step))

    return decode_tiles


def _join_tiles(tiles: list[list[chex.Array]], kept: int, overlap: int) -> chex.Array:
    """One image of `tiles`, each blended into the one above, then into its left neighbour, and cut to `kept` pixels."""
    bands = []
    above: list[chex.Array] = []
    for row in tiles:
        blended: list[chex.Array] = []
        for column, image in enumerate(row):
            if above:
                image = _blend(above[column], image, overlap, axis=1)
            if blended:
                image = _blend(blended[-1], image, overlap, axis=2)
            blended.append(image)
        bands.append(jnp.concatenate([image[:, :kept, :kept] for image in blended], axis=2))
        above = blended
    return jnp.concatenate(bands, axis=1)


def _blend(before: chex.Array, after: chex.Array, overlap: int, axis: int) -> chex.Array:
    """`after`, its first `overlap` pixels along `axis` (or as many as there are) faded in over the last of `before`."""
    overlap = min(before.shape[axis], after.shape[axis], overlap)
    shape = [1] * after.ndim
    shape[axis] = overlap
    weight = (np.arange(overlap, dtype=np.float32) / overlap).reshape(shape)
    old = jax.lax.slice_in_dim(before, before.shape[axis] - overlap, None, axis=axis)
    new, rest = jnp.split(after, [overlap], axis=axis)
    return jnp.concatenate([old * (1 - weight) + new * weight, rest], axis=axis)


def decoder_flops(config: VaeConfig, rows: int, columns: int) -> int:
    """Floating-point operations of decoding latents `[rows, columns, C]`; a multiply-add is two.

    Counts convolutions, linear layers and attention: 2.51e12 for an image of 512x512 pixels by FLUX.1's, 10.47e12 for
    1024x1024.
    """
    levels = config.block_out_channels[::-1]
    pixels, channels = rows * columns, levels[0]
    flops = pixels * _conv_flops(config.latent_channels, channels)
    flops += pixels * 2 * config.latent_channels**2 * config.use_post_quant_conv
    flops += pixels * (2 * _resnet_flops(channels, channels) + 8 * channels**2 + 4 * pixels * channels)  # middle
    for index, out in enumerate(levels):
        flops += pixels * (_resnet_flops(channels, out) + config.layers_per_block * _resnet_flops(out, out))
        channels = out
        if index < len(levels) - 1:
            pixels *= 4
            flops += pixels * _conv_flops(channels, channels)
    return flops + pixels * _conv_flops(channels, 3)


def _conv_flops(inputs: int, outputs: int) -> int:
    return 2 * 9 * inputs * outputs


def _resnet_flops(inputs: int, outputs: int) -> int:
    shortcut = 0 if inputs == outputs else 2 * inputs * outputs
    return _conv_flops(inputs, outputs) + _conv_flops(outputs, outputs) + shortcut
