"""CLIP's text encoder of transformers, small and with random weights: what ours is held against.

`python -m tests.oracle.clip` writes tests/golden/clip.npz.
"""

import dataclasses
from pathlib import Path

import numpy as np

from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.published.clip import projected_text_config_from_transformers, text_config_from_transformers
from tests.oracle.random_weights import random_tensors

GOLDEN = Path(__file__).parent.parent / "golden" / "clip.npz"
SEEDS = range(5)  # one draw of weights says little about rounding


@dataclasses.dataclass(frozen=True)
class Case:
    """A config.json, the shape of the ids, and whether there is a projection."""

    published: dict
    batch: int
    length: int
    projected: bool = False

    @property
    def read(self):
        return projected_text_config_from_transformers if self.projected else text_config_from_transformers

    @property
    def config(self):
        return self.read(Published(self.published))


def published_config(width, layers, heads, mlp, vocab, positions, act, eos, projection=512):
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp,
        "vocab_size": vocab, "max_position_embeddings": positions, "hidden_act": act, "eos_token_id": eos,
        "bos_token_id": 0, "pad_token_id": 1, "layer_norm_eps": 1e-5,
        "projection_dim": projection,
    }  # fmt: skip


CASES = {
    "legacy_eos": Case(published_config(32, 2, 4, 80, 60, 16, "quick_gelu", 2), batch=3, length=11),
    "real_eos": Case(published_config(48, 3, 3, 64, 90, 20, "gelu", 40), batch=4, length=13),
    "full_length": Case(published_config(128, 2, 2, 192, 200, 77, "quick_gelu", 2), batch=1, length=77),
    "legacy_eos_gelu": Case(published_config(40, 1, 5, 96, 50, 9, "gelu", 2), batch=3, length=7),
    "projected": Case(published_config(48, 4, 3, 96, 70, 77, "gelu", 2, 32), batch=2, length=15, projected=True),
    "projected_real_eos": Case(published_config(32, 3, 2, 80, 60, 18, "quick_gelu", 50, 48), 3, 13, projected=True),
    "projected_one_layer": Case(published_config(40, 1, 5, 64, 50, 9, "gelu", 2, 24), 2, 9, projected=True),
}


def inputs(case):
    """Ids `[B, L]`: the end at another place of each row; after a real end id also other ids."""
    rng = np.random.default_rng(7)
    legacy = case.config.eos_id is None
    eos = case.config.vocab_size - 1 if legacy else case.config.eos_id
    ids = rng.integers(0, case.config.vocab_size - 1, (case.batch, case.length))
    places = np.arange(case.length)
    ends = rng.integers(0, case.length, (case.batch, 1))
    ids = np.where((places < ends) & (ids == eos), 0, ids)
    ids[(places == ends) | (legacy & (places > ends)) | (places > ends + 3)] = eos
    return ids.astype(np.int32)


def published_model(case, seed=0):
    """transformers' model; every tensor is determined by its name, spelled as in published files, and its shape."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if case.projected else CLIPTextModel
    # Attention written out, whose operations a counter of FLOPs sees.
    model = kind(CLIPTextConfig(**case.published, attn_implementation="eager")).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    spelled = {
        name if name.startswith("text_projection") else f"text_model.{name.removeprefix('text_model.')}": shape
        for name, shape in shapes.items()
    }
    tensors = [torch.from_numpy(array) for array in random_tensors(spelled, seed).values()]
    model.load_state_dict(dict(zip(shapes, tensors, strict=True)), strict=True)
    return model


def outputs(case, model):
    """Token states, the pooled one, projected if it is, and those before the last layer, float32."""
    import torch

    with torch.no_grad():
        features = model(torch.from_numpy(inputs(case)).long(), output_hidden_states=True)
    return {
        "states": features.last_hidden_state.float().numpy(),
        "pooled": (features.text_embeds if case.projected else features.pooler_output).float().numpy(),
        "penultimate": features.hidden_states[-2].float().numpy(),
    }


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
