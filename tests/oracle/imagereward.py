"""ImageReward's own code, small and with random weights: what ours is held against.

`python -m tests.oracle.imagereward` writes tests/golden/imagereward.npz, from the repository's root, in an environment
of its own, because this code fails on any newer transformers: Python 3.11, `pip install torch==2.13.0
transformers==4.36.2 'huggingface_hub<1' timm==0.6.13 'numpy<2' pillow`, then `pip install --no-deps image-reward==1.5
fairscale torchvision`.
"""

import dataclasses
import functools
import importlib
import json
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import numpy as np

from tests.oracle.random_weights import random_tensors
from tests.oracle.torchvision_shim import define_missing_operators

GOLDEN = Path(__file__).parent.parent / "golden" / "imagereward.npz"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    "a", "photo", "of", "cat", "the", "dog", "and", "two", "it", "isn", "cafe", "naive", "##s", "##t", "##ing",
    "##clair", "e", "##d", "un", "##ico", "##de", "##ta", "tag", "猫", "写", "真", "100", "3", "##rd", "text", "end",
    "sep", "enc",
)  # fmt: skip
PROMPTS = (
    "a photo of a cat",
    "A Photo,  of\tTWO cats\n",
    "it's the dog's 3rd photo... isn't it?!",
    "Café naïve Ünïcode e\u0301clair",
    "一只猫的照片, 写真 カメラ ①②",
    "🐱🚀 a cat 👩‍🚀",
    "",
    "  \u200b\u00a0 \x07cats ",
    " ".join(["photo of the cat and 12 dogs,"] * 9),
    "the end [SEP] of [ENC] the [PAD] text [dec]",
    "fish & chips &amp; “quotes” — <tag> under_score #ta ##ta",
    "a" * 120 + " cat " + "ab" * 40,
)
SIZES = ((224, 224), (256, 391), (391, 256), (97, 101), (231, 230))
"""Heights and widths of images: as wanted, wide, tall, odd and smaller, odd and by few pixels larger."""


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of both towers: width, layers, heads, and what else they have."""

    vision: tuple[int, int, int]
    patch: int
    text: tuple[int, int, int]
    mlp_dim: int
    length: int

    @property
    def config(self):
        from egrpo_jax.models.blip import BlipConfig
        from egrpo_jax.models.layers import StackConfig

        return BlipConfig(
            vision=StackConfig(*self.vision, 4 * self.vision[0]),
            text=StackConfig(*self.text, self.mlp_dim),
            patch_size=self.patch,
            vocab_size=len(vocabulary()) + 2,
            length=self.length,
        )

    @property
    def med_config(self):
        """The file beside the published weights, with these sizes."""
        return {
            "architectures": ["BertModel"], "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1, "hidden_size": self.text[0], "initializer_range": 0.02,
            "intermediate_size": self.mlp_dim, "layer_norm_eps": 1e-12, "max_position_embeddings": self.length,
            "model_type": "bert", "num_attention_heads": self.text[2], "num_hidden_layers": self.text[1],
            "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": len(vocabulary()) + 2, "encoder_width": 768,
            "add_cross_attention": True,
        }  # fmt: skip


CASES = {
    "patch_16": Case(vision=(48, 3, 4), patch=16, text=(32, 2, 4), mlp_dim=80, length=64),
    "patch_32": Case(vision=(40, 2, 5), patch=32, text=(64, 3, 2), mlp_dim=96, length=35),
}


def vocabulary():
    """Pieces in BERT's spelling: special tokens, single characters at a word's start and inside, `WORDS`."""
    characters = [chr(code) for code in (*range(33, 65), *range(91, 127))]
    inside = [f"##{character}" for character in characters if character.isalnum()]
    return list(dict.fromkeys([*SPECIAL, *characters, *inside, *WORDS]))


def write_vocabulary(path):
    Path(path).write_text("\n".join(vocabulary()) + "\n", "utf-8")


def images():
    """Images uint8 `[H, W, 3]`, one for each prompt: coarse squares, whose edges any mistake in resizing moves."""
    rng = np.random.default_rng(11)
    made = []
    for index in range(len(PROMPTS)):
        height, width = SIZES[index % len(SIZES)]
        side = 5 + 3 * (index % 4)
        squares = rng.integers(0, 256, (height // side + 1, width // side + 1, 3), np.uint8)
        made.append(squares.repeat(side, 0).repeat(side, 1)[:height, :width])
    return made


def network_inputs():
    """Normalised images `[4, 224, 224, 3]`, token ids `[4, 11]` and the mask of padding after 11, 1, 5 and 8 tokens."""
    rng = np.random.default_rng(12)
    ids = rng.integers(5, len(vocabulary()) + 2, (4, 11))
    mask = np.arange(11) < np.array([11, 1, 5, 8])[:, None]
    pixels = rng.standard_normal((4, 224, 224, 3)).astype(np.float32)
    return pixels, ids.astype(np.int32), mask


@functools.cache
def published_code():
    """The modules by their names, with stand-ins for what is imported and not used."""
    import transformers

    library = define_missing_operators()
    assert transformers.BertTokenizer  # looks for the package datasets, which must not be a stand-in yet
    for name in ("clip", "datasets", "ImageReward.ReFL"):
        sys.modules[name] = types.ModuleType(name)
    importlib.import_module("ImageReward")
    names = ("ImageReward", "models.BLIP.blip", "models.BLIP.blip_pretrain", "models.BLIP.vit")
    return library, *(sys.modules[f"ImageReward.{name}"] for name in names)


def published_model(case, folder):
    """ImageReward's model; every tensor is determined by its published name and its shape."""
    import torch
    from transformers import BertTokenizer

    _, module, blip, pretrain, vit = published_code()
    config, words = Path(folder, "med_config.json"), Path(folder, "vocab.txt")
    config.write_text(json.dumps(case.med_config))
    write_vocabulary(words)
    width, layers, heads = case.vision
    tower = vit.VisionTransformer(img_size=224, patch_size=case.patch, embed_dim=width, depth=layers, num_heads=heads)
    local = types.SimpleNamespace(from_pretrained=lambda _: BertTokenizer(str(words)))
    head = module.MLP(case.text[0])
    with (
        mock.patch.object(pretrain, "create_vit", return_value=(tower, width)),
        mock.patch.object(blip, "BertTokenizer", local),
        mock.patch.object(module, "MLP", return_value=head),
    ):
        model = module.ImageReward(str(config)).eval()
    buffer = "blip.text_encoder.embeddings.position_ids"
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != buffer}
    tensors = {name: torch.from_numpy(array) for name, array in random_tensors(shapes).items()}
    model.load_state_dict(tensors | {buffer: model.state_dict()[buffer]}, strict=True)
    return model


def outputs(model):
    """Scores `[B]` of `images` for `PROMPTS` and of `network_inputs`; token ids; the shapes of the state dict."""
    import torch
    from PIL import Image

    pixels, ids, mask = network_inputs()
    with torch.no_grad():
        scores = [model.score(text, Image.fromarray(image)) for text, image in zip(PROMPTS, images(), strict=True)]
        network = model.score_gard(
            torch.from_numpy(ids).long(), torch.from_numpy(mask).long(), torch.from_numpy(pixels).permute(0, 3, 1, 2)
        )
        encoded = model.blip.tokenizer(list(PROMPTS), padding="max_length", truncation=True, max_length=35)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    return {
        "scores": np.array(scores, np.float32),
        "network": network[:, 0].numpy(),
        "ids": np.array(encoded.input_ids, np.int32),
        "mask": np.array(encoded.attention_mask, bool),
        "shapes": np.array(json.dumps(shapes)),
    }


def main():
    arrays = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = published_model(case, folder)
        arrays |= {f"{name}/{key}": array for key, array in outputs(model).items()}
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
