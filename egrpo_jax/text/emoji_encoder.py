"""Prompts to text features, through the embedded tokenizer and text encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import chex
import jax
import numpy as np

from egrpo_jax.models.text_encoder import TextFeatures
from egrpo_jax.text.emoji import tokenize
from egrpo_jax.weights.assets import Params, load_text_encoder


@functools.cache
def _encoder() -> tuple[Callable[[Params, chex.Array], TextFeatures], Params]:
    model, params = load_text_encoder()
    return jax.jit(lambda weights, ids: model.apply({"params": weights}, ids)), params


def encode_prompts(prompts: Sequence[str]) -> TextFeatures:
    """Features of `prompts`: token states `[B, 8, 192]` and unit vectors `[B, 384]`, float32 NumPy arrays.

    A prompt's features do not depend on the others. Raises UserError if an asset is missing.
    """
    encode, params = _encoder()
    ids = tokenize(prompts)
    # Padded to powers of two, so that a handful of compilations serves every number of prompts.
    size = 1 << max(len(ids) - 1, 7).bit_length()
    features = encode(params, np.pad(ids, ((0, size - len(ids)), (0, 0))))
    return TextFeatures(*(np.asarray(array)[: len(ids)] for array in features))
