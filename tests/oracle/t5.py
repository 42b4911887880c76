"""The T5 v1.1 encoder of transformers, small and with random weights: what ours is held against.

`python -m tests.oracle.t5` writes tests/golden/t5.npz.
"""

import dataclasses
from pathlib import Path

import numpy as np

from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.published.t5 import config_from_transformers
from tests.oracle.random_weights import random_tensors

GOLDEN = Path(__file__).parent.parent / "golden" / "t5.npz"
SEEDS = range(5)  # one draw of weights says little about rounding


@dataclasses.dataclass(frozen=True)
class Case:
    """A config.json and the shape of the ids."""

    published: dict
    batch: int
    length: int

    @property
    def config(self):
        return config_from_transformers(Published(self.published))


def published_config(width, layers, heads, head_dim, mlp, vocab, buckets=32, distance=128):
    return {
        "d_model": width, "num_layers": layers, "num_heads": heads, "d_kv": head_dim, "d_ff": mlp, "vocab_size": vocab,
        "relative_attention_num_buckets": buckets, "relative_attention_max_distance": distance,
        "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False,
    }  # fmt: skip


CASES = {
    "two_layers": Case(published_config(24, 2, 4, 8, 40, 50), batch=3, length=17),
    "wide_heads": Case(published_config(32, 3, 3, 16, 56, 70, buckets=12, distance=20), batch=2, length=29),
    "beyond_max_distance": Case(published_config(48, 2, 4, 12, 64, 80), batch=1, length=161),
}


def inputs(case):
    """Ids `[B, L]` that end in 1 and padding 0, each row at another place."""
    rng = np.random.default_rng(7)
    ids = rng.integers(2, case.config.vocab_size, (case.batch, case.length))
    places = np.arange(case.length)
    ends = rng.integers(1, case.length, (case.batch, 1))
    return np.where(places < ends, ids, np.where(places == ends, 1, 0)).astype(np.int32)


def published_model(case, seed=0):
    """transformers' model; every tensor is determined by its name and shape."""
    import torch
    from transformers import T5Config, T5EncoderModel

    # Attention written out, whose operations a counter of FLOPs sees.
    model = T5EncoderModel(T5Config(**case.published, attn_implementation="eager")).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = random_tensors({name: shape for name, shape in shapes.items() if "embed_tokens" not in name}, seed)
    tensors |= {name: tensors["shared.weight"] for name in shapes if "embed_tokens" in name}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()}, strict=True)
    return model


def outputs(case, model):
    """The states, float32; no mask, as FLUX calls it."""
    import torch

    with torch.no_grad():
        states = model(torch.from_numpy(inputs(case)).long()).last_hidden_state
    return {"states": states.float().numpy()}


def bfloat16_error(exact, rounded):
    """Root mean square difference of the arrays of one name, averaged over the draws of weights."""
    return {
        key: np.mean([np.sqrt(np.square(x[key] - y[key]).mean()) for x, y in zip(exact, rounded, strict=True)])
        for key in exact[0]
    }


def cases():
    """Every case's arrays by name, in float32, and (`bf16_error_*`) how far those in bfloat16 are from them."""
    import torch

    named = {}
    for name, case in CASES.items():
        models = [published_model(case, seed) for seed in SEEDS]
        exact = [outputs(case, model) for model in models]
        errors = bfloat16_error(exact, [outputs(case, model.to(torch.bfloat16)) for model in models])
        named[name] = exact[0] | {f"bf16_error_{key}": error for key, error in errors.items()}
    return named


def main():
    arrays = {f"{case}/{name}": array for case, named in cases().items() for name, array in named.items()}
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
