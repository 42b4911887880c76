"""The Qwen3 of transformers, small and with random weights: what ours is held against.

`python -m tests.oracle.qwen3` writes tests/golden/qwen3.npz.
"""

import dataclasses
from pathlib import Path

import numpy as np

from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.published.qwen3 import PREFIX, config_from_transformers
from tests.oracle.random_weights import random_tensors
from tests.oracle.torchvision_shim import define_missing_operators

GOLDEN = Path(__file__).parent.parent / "golden" / "qwen3.npz"
SEEDS = range(5)  # one draw of weights says little about rounding


@dataclasses.dataclass(frozen=True)
class Case:
    """A config.json, the layers to take states after, the shape of the ids and how many of each row are real."""

    published: dict
    layers: tuple
    length: int
    real: tuple

    @property
    def config(self):
        return config_from_transformers(Published(self.published))


def published_config(width, layers, heads, kv_heads, head_dim, mlp, vocab, theta=1_000_000):
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "intermediate_size": mlp, "vocab_size": vocab,
        "rope_theta": theta, "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False,
        "tie_word_embeddings": True, "max_position_embeddings": 640, "use_sliding_window": False,
    }  # fmt: skip


CASES = {
    "three_layers_of_five": Case(published_config(24, 5, 4, 2, 8, 40, 50), (1, 2, 4), length=17, real=(17, 5, 1)),
    "one_layer_wide_heads": Case(published_config(32, 4, 6, 3, 16, 56, 70, 10_000), (3,), length=29, real=(13, 28)),
    "head_128_long": Case(published_config(48, 3, 4, 1, 128, 64, 80), (2, 1), length=97, real=(60,)),
}


def inputs(case):
    """Ids `[B, L]`, 0 where they are padding, and the mask `[B, L]`."""
    rng = np.random.default_rng(7)
    shape = (len(case.real), case.length)
    mask = np.arange(case.length) < np.array(case.real)[:, None]
    return np.where(mask, rng.integers(0, case.config.vocab_size, shape), 0).astype(np.int32), mask


def cotangent(case):
    """What the states are multiplied with, before they are summed, where gradients are compared."""
    shape = (len(case.real), case.length, len(case.layers) * case.config.width)
    return np.random.default_rng(8).standard_normal(shape).astype(np.float32)


def published_model(case, seed=0, attention="eager"):
    """transformers' model; every tensor is determined by its name and shape."""
    define_missing_operators()
    import torch
    from transformers import Qwen3Config, Qwen3Model

    model = Qwen3Model(Qwen3Config(**case.published, attn_implementation=attention)).eval()
    shapes = {PREFIX + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = random_tensors(shapes, seed)
    model.load_state_dict({name.removeprefix(PREFIX): torch.from_numpy(array) for name, array in tensors.items()})
    return model


def published_states(model, case):
    """The states of transformers' model, a torch tensor."""
    import torch

    ids, mask = (torch.from_numpy(array) for array in inputs(case))
    hidden = model(ids.long(), attention_mask=mask.long(), output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([hidden[layer] for layer in case.layers], dim=-1)


def outputs(case, model):
    """The states, float32."""
    import torch

    with torch.no_grad():
        return {"states": published_states(model, case).float().numpy()}


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
