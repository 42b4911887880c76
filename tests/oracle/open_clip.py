"""open_clip, small and with random weights: what CLIP scores, HPSv2 and the aesthetic predictor are held against.

`python -m tests.oracle.open_clip` writes tests/golden/open_clip.npz; it needs open_clip_torch and torchvision.
"""

import dataclasses
import gzip
import json
import tempfile
from pathlib import Path

import numpy as np

from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.published.open_clip import config_from_open_clip
from tests.oracle.random_weights import random_tensors
from tests.oracle.scored_images import SIZES, TEXTS, images, prompts
from tests.oracle.tokenizers import write_clip
from tests.oracle.torchvision_shim import define_missing_operators

GOLDEN = Path(__file__).parent.parent / "golden" / "open_clip.npz"
LOGIT_SCALE = np.float32(4.6052)
HEAD = {0: 1024, 2: 128, 4: 64, 6: 16, 7: 1}
"""Where the linear layers of LAION's aesthetic predictor are, and their widths; the others are dropout."""


def vocab_size():
    with tempfile.TemporaryDirectory() as folder:
        write_clip(folder)
        return len(json.loads(Path(folder, "vocab.json").read_text("utf-8")))


@dataclasses.dataclass(frozen=True)
class Case:
    """What an open_clip_config.json holds."""

    vision: dict
    text: dict
    dim: int
    quick_gelu: bool = False
    resize_mode: str = "shortest"

    @property
    def published(self):
        model = {
            "embed_dim": self.dim,
            "vision_cfg": self.vision,
            "text_cfg": {"context_length": 77, "vocab_size": vocab_size(), **self.text},
            **({"quick_gelu": True} if self.quick_gelu else {}),
        }
        return {"model_cfg": model, "preprocess_cfg": {"interpolation": "bicubic", "resize_mode": self.resize_mode}}

    @property
    def config(self):
        return config_from_open_clip(Published(self.published["model_cfg"]))

    @property
    def sizes(self):
        """Of images, those whose rows every Pillow resizes first; version 13 squashes tall ones by columns first."""
        return [size for size, (height, width) in SIZES.items() if self.resize_mode == "shortest" or height <= width]


def tensors(shapes):
    """The state dict with tensors of `shapes`, each of them determined by its name and exact in float16, as HPSv2's."""
    named = random_tensors(shapes) | {"logit_scale": LOGIT_SCALE}
    return {name: np.asarray(array, np.float16).astype(np.float32) for name, array in named.items()}


CASES = {
    "gelu": Case(
        vision={"image_size": 28, "patch_size": 7, "width": 32, "layers": 2, "head_width": 16},
        text={"width": 24, "layers": 2, "heads": 3},
        dim=20,
    ),
    "quick_gelu": Case(
        vision={"image_size": 42, "patch_size": 14, "width": 48, "layers": 3, "head_width": 8},
        text={"width": 32, "layers": 1, "heads": 4},
        dim=36,
        quick_gelu=True,
        resize_mode="squash",
    ),
    "heads_of_80": Case(
        vision={"image_size": 37, "patch_size": 9, "width": 160, "layers": 1, "head_width": 80, "mlp_ratio": 3.0},
        text={"width": 40, "layers": 2, "heads": 5, "mlp_ratio": 2.0},
        dim=24,
    ),
}


def published_tokenizer():
    """open_clip's, over the vocabulary of `write_clip`."""
    define_missing_operators()
    from open_clip.tokenizer import SimpleTokenizer

    with tempfile.TemporaryDirectory() as folder:
        write_clip(folder)
        path = Path(folder, "merges.txt.gz")
        path.write_bytes(gzip.compress(Path(folder, "merges.txt").read_text("utf-8").rstrip("\n").encode()))
        return SimpleTokenizer(str(path))


def published_model(case):
    """open_clip's model; every tensor is determined by its name and its shape."""
    define_missing_operators()
    import open_clip
    import torch

    published = case.published["model_cfg"]
    model = open_clip.CLIP(**published).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.tensor(array) for name, array in tensors(shapes).items()}, strict=True)
    return model


def transforms(case):
    """From a PIL image to the network's input: open_clip's, and HPSv2's, which resizes tensors."""
    define_missing_operators()
    import open_clip
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    size = case.config.vision.image_size
    hps = Compose(
        [
            ToTensor(),
            Resize(size, InterpolationMode.BICUBIC, antialias=True),
            CenterCrop(size),
            Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ]
    )
    return {"clip": open_clip.image_transform(size, is_train=False, resize_mode=case.resize_mode), "hps": hps}


def head_tensors(dim):
    """The state dict of LAION's aesthetic predictor."""
    before, shapes = dim, {}
    for place, after in HEAD.items():
        shapes |= {f"layers.{place}.weight": (after, before), f"layers.{place}.bias": (after,)}
        before = after
    return random_tensors(shapes)


def published_head(dim):
    """The predictor as it is built for inference."""
    import torch
    from torch import nn

    layers = [nn.Dropout() for _ in range(8)]
    before = dim
    for place, after in HEAD.items():
        layers[place] = nn.Linear(before, after)
        before = after
    head = nn.Sequential(*layers).eval()
    tensors = {name.removeprefix("layers."): torch.from_numpy(array) for name, array in head_tensors(dim).items()}
    head.load_state_dict(tensors, strict=True)
    return head


def marks(case):
    """By name, the predictor's marks for each size of images, which it sees as OpenAI's CLIP does."""
    import torch
    from PIL import Image

    model, head, named = published_model(case), published_head(case.dim), {}
    transform = transforms(dataclasses.replace(case, resize_mode="shortest"))["clip"]
    with torch.no_grad():
        for size in SIZES:
            pixels = torch.stack([transform(Image.fromarray(image)) for image in images(size)])
            named[f"marks_{size}"] = head(model.encode_image(pixels, normalize=True))[:, 0].numpy()
    return named


def outputs(case, model=None):
    """By name: vectors of `images` and `TEXTS`, and for each size of images the cosines with their prompts."""
    import torch
    from PIL import Image

    model, tokenize = model or published_model(case), published_tokenizer()
    named = {}
    with torch.no_grad():
        named["texts"] = model.encode_text(tokenize(list(TEXTS)), normalize=True).numpy()
        for size in case.sizes:
            texts = model.encode_text(tokenize(prompts(size)), normalize=True)
            for kind, transform in transforms(case).items():
                pixels = torch.stack([transform(Image.fromarray(image)) for image in images(size)])
                vectors = model.encode_image(pixels, normalize=True)
                named[f"{kind}_images_{size}"] = vectors.numpy()
                named[f"{kind}_{size}"] = (vectors * texts).sum(-1).numpy()
    return named


def pixels():
    """HPSv2's and open_clip's input for the case "gelu", by kind and size of the images."""
    from PIL import Image

    return {
        f"pixels/{kind}_{size}": np.stack([transform(Image.fromarray(image)).numpy() for image in images(size, 1)])
        for kind, transform in transforms(CASES["gelu"]).items()
        for size in SIZES
    }


def cases():
    """Every array of the golden file."""
    named = {name: outputs(case) for name, case in CASES.items()}
    named["quick_gelu"] |= marks(CASES["quick_gelu"])
    flat = {f"{name}/{key}": array for name, arrays in named.items() for key, array in arrays.items()}
    ids = published_tokenizer()(list(TEXTS)).numpy().astype(np.int32)
    return flat | pixels() | {"tokens/ids": ids}


def main():
    np.savez_compressed(GOLDEN, **cases())


if __name__ == "__main__":
    main()
