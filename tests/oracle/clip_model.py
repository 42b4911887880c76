"""transformers' CLIPModel, small and with random weights: what PickScore is held against, and CLIPs of that format.

`python -m tests.oracle.clip_model` writes tests/golden/clip_model.npz.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.published.clip import config_from_transformers
from tests.oracle.open_clip import tensors, vocab_size
from tests.oracle.scored_images import SIZES, TEXTS, images, prompts
from tests.oracle.tokenizers import published_clip_ids, write_clip
from tests.oracle.torchvision_shim import define_missing_operators

GOLDEN = Path(__file__).parent.parent / "golden" / "clip_model.npz"


@dataclasses.dataclass(frozen=True)
class Case:
    """What a config.json holds."""

    vision: dict
    text: dict
    dim: int
    act: str

    @property
    def published(self):
        common = {"hidden_act": self.act, "layer_norm_eps": 1e-5}
        text = {"max_position_embeddings": 77, "vocab_size": vocab_size(), **self.text, **common}
        return {
            "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": self.dim,
            "text_config": text, "vision_config": {**self.vision, **common},
        }  # fmt: skip

    @property
    def config(self):
        return config_from_transformers(Published(self.published))


def tower(width, layers, heads, mlp, **others):
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp,
    } | others  # fmt: skip


CASES = {
    "pickscore": Case(
        tower(48, 2, 3, 96, image_size=35, patch_size=7), tower(32, 2, 4, 80, eos_token_id=2), 40, "gelu"
    ),
    "quick_gelu": Case(
        tower(32, 3, 2, 64, image_size=45, patch_size=14),
        tower(24, 1, 2, 64, eos_token_id=vocab_size() - 1),
        24,
        "quick_gelu",
    ),
    "heads_of_80": Case(
        tower(160, 1, 2, 200, image_size=32, patch_size=8), tower(40, 1, 4, 48, eos_token_id=2), 20, "gelu"
    ),
}


def published_model(case):
    """transformers' model; every tensor is determined by its name and its shape."""
    define_missing_operators()
    import torch
    from transformers import CLIPConfig, CLIPModel

    # Attention written out, whose operations a counter of FLOPs sees.
    model = CLIPModel(CLIPConfig(**{**case.published, "architectures": None}, attn_implementation="eager")).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.tensor(array) for name, array in tensors(shapes).items()}, strict=True)
    return model


def processed(case, arrays):
    """Images uint8 `[B, H, W, 3]` as transformers' processor prepares them with Pillow."""
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = case.config.vision.image_size
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, resample=Image.Resampling.BICUBIC
    )
    return processor([Image.fromarray(image) for image in arrays], return_tensors="pt")["pixel_values"]


def outputs(case, model=None):
    """By name: vectors of `images` and `TEXTS`, and for each size of images PickScore's for their prompts."""
    import torch

    model, named = model or published_model(case), {}
    unit = lambda output: torch.nn.functional.normalize(getattr(output, "pooler_output", output), dim=-1)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        write_clip(folder)
        encode = lambda texts: unit(model.get_text_features(torch.from_numpy(published_clip_ids(folder, texts)).long()))
        named["texts"] = encode(TEXTS).numpy()
        for size in SIZES:
            vectors = unit(model.get_image_features(processed(case, images(size))))
            named[f"images_{size}"] = vectors.numpy()
            named[f"scores_{size}"] = (model.logit_scale.exp() * (vectors * encode(prompts(size))).sum(-1)).numpy()
    return named


def cases():
    """Every array of the golden file."""
    return {f"{name}/{key}": array for name, case in CASES.items() for key, array in outputs(case).items()}


def main():
    np.savez_compressed(GOLDEN, **cases())


if __name__ == "__main__":
    main()
