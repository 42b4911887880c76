"""A published model as a config asks for it: its family, its sizes, and what follows from these and the options."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.models.attention import NEEDS, takes
from egrpo_jax.models.lora import COLLECTION, LoraConfig
from egrpo_jax.models.vae import VaeConfig
from egrpo_jax.pipelines.families import Family, family_of, released
from egrpo_jax.pipelines.published.options import PublishedOptions
from egrpo_jax.weights.configs import Published, read_config, read_object
from egrpo_jax.weights.hub import resolve
from egrpo_jax.weights.published import vae

ORBAX = "orbax"
"""The folder inside what `convert --to orbax` writes."""
_INDEX = "model_index.json"
_PATCH = 2  # latents along each side of an image token
_STRIDE = 8  # pixels along each side of a latent


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model, not loaded.

    Attributes:
      family: that it belongs to.
      sizes: of its transformer, in the family's own config.
      vae: of its autoencoder.
      options: the config's.
      index: the pipeline's model_index.json; empty for a model whose files are not here.
    """

    family: Family
    sizes: Any
    vae: VaeConfig
    options: PublishedOptions
    index: Mapping[str, Any]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        side = _PATCH * _STRIDE
        return self.options.height // side, self.options.width // side

    @property
    def latents_shape(self) -> tuple[int, int]:
        """(N, D)."""
        return self.grid[0] * self.grid[1], self.family.token_channels(self.sizes)

    @property
    def text_tokens(self) -> int:
        """The option of this name, or its published value."""
        given = self.options.text_tokens
        return self.family.text.tokens(self.sizes) if given is None else given

    @functools.cached_property
    def conditioning(self) -> Any:
        """That of one prompt, as `jax.ShapeDtypeStruct`."""
        return self.family.text.conditioning(self.sizes, self.text_tokens, jnp.dtype(self.options.dtype))

    @property
    def guidance(self) -> float:
        """The option of this name, or its published value."""
        given = self.options.guidance
        scale = self.family.guidance(self.sizes, self.index) if given is None else given
        if scale is None:
            unguided = f"a scale, or {self.family.unguided:g} for a model that is distilled to none"
            raise ConfigError("guidance", None, f"{unguided}: the files do not tell (docs/models.md)")
        return scale

    @property
    def guided_by(self) -> float | None:
        """The scale of `guided`, whose velocity takes a second forward pass, for the negative prompt; None without."""
        unguided = None if self.family.embeds_guidance(self.sizes) else self.family.unguided
        return None if unguided is None or self.guidance <= unguided else 1 + self.guidance - unguided

    @property
    def negatives(self) -> tuple[str, ...]:
        """The prompts that are guided away from: one, or none."""
        return () if self.guided_by is None else (self.options.negative,)

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters that are trained, if any."""
        return None if self.options.lora is None else self.options.lora.adapters(self.family.presets)

    @property
    def trainable(self) -> str:
        """A pattern of the paths of the parameters that training changes."""
        if self.lora is not None:
            return f"^{COLLECTION}/"
        constants = self.family.constants
        return "^flow/" if constants is None else f"^flow/(?!{constants})"

    @property
    def text_settings(self) -> dict[str, Any]:
        """All that determines the conditioning of a prompt, as JSON values."""
        shapes = {name: list(leaf.shape) for name, leaf in self.conditioning._asdict().items()}
        return {"family": self.family.name, "text_tokens": self.text_tokens, **shapes}

    def check(self) -> None:
        """Raises ConfigError for more than the model has positions for, or an attention that does not run here."""
        longest = self.family.max_text(self.sizes)
        if longest is not None and self.text_tokens > longest:
            raise ConfigError("text_tokens", self.text_tokens, f"at most {longest}: the model has no more positions")
        largest = self.family.max_side(self.sizes)
        for key, side in zip(("height", "width"), self.grid, strict=True):
            if largest is not None and side > largest:
                most = largest * _PATCH * _STRIDE
                raise ConfigError(key, getattr(self.options, key), f"at most {most}: the model has no more positions")
        tokens = len(self.conditioning.text) + self.latents_shape[0]
        query = jax.ShapeDtypeStruct((1, tokens, self.sizes.num_heads, self.sizes.head_dim), self.options.dtype)
        if not takes(self.options.attention, query):
            needs = f"'auto' or 'xla', or for {self.options.attention!r} {NEEDS[self.options.attention]}"
            raise ConfigError("attention", self.options.attention, needs)


def pipeline_folder(path: str, text: bool) -> Path:
    """The local folder of the pipeline `path`; from the Hub without what is not needed, and text encoders if `text`."""
    family = family_of(resolve(path, [_INDEX, "transformer/config.json"]))
    parts = ["transformer", "vae", "scheduler", *(family.text.parts if text else ())]
    return resolve(path, [_INDEX, "LICENSE*", *(f"{part}/*" for part in parts)])


def read_model(folder: Path, options: PublishedOptions) -> Model:
    """The model in a pipeline's `folder`.

    Raises:
      UserError: a config file is missing, damaged, or of another model.
      ConfigError: an option does not fit it.
    """
    family = family_of(folder)
    sizes = read_sizes(family, folder / "transformer", options)
    index = folder / _INDEX
    decoder = _read_vae(family, folder / "vae", family.token_channels(sizes))
    return Model(family, sizes, decoder, options, read_object(index) if index.is_file() else {})


def sketch_model(path: str, options: PublishedOptions) -> Model:
    """The model in the folder `path`, or the published one of that name, if it is not there.

    Raises:
      UserError: as `read_model`, or no such name is known.
    """
    folder = Path(path)
    if folder.is_dir():
        return read_model(folder, options)
    family, sizes = released(path)
    return Model(family, sizes, family.vae, options, {})


def read_sizes(family: Family, folder: Path, options: PublishedOptions) -> Any:
    """The sizes of the transformer in `folder`, or of another: a folder has its own, a file those of `folder`.

    Raises:
      UserError: its config.json is missing, or of another model.
      ConfigError: the other is not there, or of a kind that cannot be stored as int8.
    """
    other = options.transformer
    source = folder if other is None else Path(other)
    if not source.exists() and other is not None:
        raise ConfigError("transformer", other, "an existing file or folder of weights")
    if options.int8_base and (source / ORBAX).is_dir():
        raise ConfigError("int8_base", True, f"a transformer in safetensors, not an Orbax checkpoint as in {source}")
    place = source if other is None or source.is_dir() else folder
    return family.read_sizes(read_config(place, family.class_name))


def _read_vae(family: Family, folder: Path, token_channels: int) -> VaeConfig:
    """The autoencoder in `folder`, held against a transformer of these tokens."""
    published: Published = read_config(folder, family.vae_class)
    config = vae.config_from_diffusers(published)
    channels = token_channels / _PATCH**2
    if config.latent_channels != channels:
        raise published.error(
            "latent_channels",
            f"{channels:g}: {_PATCH} x {_PATCH} latents are the {token_channels} channels of a token",
        )
    if config.stride != _STRIDE:
        raise published.error(
            "block_out_channels", f"4 levels: a latent of {family.name} is {_STRIDE} x {_STRIDE} pixels"
        )
    return config
