"""Images scored a second under ViT-H-14, the CLIP of HPSv2: ours against open_clip on the same CPU, in one run.

    python -m benchmarks.clip --rounds=3

From images of 8 bits to cosines, float32, random weights, two threads for either; texts are encoded before, once.
Either does what it does in use: ours the whole batch in one compiled function, theirs each image with Pillow, then
the network. Needs open_clip_torch, torchvision and 8 GB of memory; `--size=small` tries it out. Cosines are compared
before anything is timed. Rounds alternate, so that what else the machine does falls on both.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from egrpo_jax import cli
from egrpo_jax.models.clip import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig, TransformerConfig, image_flops
from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.rewards.clip import ImageFeatures
from egrpo_jax.rewards.clip_files import LoadedClip, clip_shapes
from egrpo_jax.rewards.preprocess import Preprocess
from egrpo_jax.weights.layout import Params, export_tensors
from egrpo_jax.weights.published.open_clip import open_clip_layout
from tests.oracle.torchvision_shim import define_missing_operators

# The text tower, which takes no part, is left out: of this size it takes no memory.
NO_TEXT = ClipTextConfig(TransformerConfig(8, 1, 1, 8, "gelu"), vocab_size=8, length=8)
CONFIGS = {
    "ViT-H-14": ClipConfig(text=NO_TEXT),
    "small": ClipConfig(ClipVisionConfig(TransformerConfig(128, 4, 4, 512, "gelu")), NO_TEXT, 64),
}

FLAGS = flags.FlagValues()
SIZE = flags.DEFINE_enum("size", "ViT-H-14", list(CONFIGS), "The model.", flag_values=FLAGS)
PIXELS = flags.DEFINE_integer("pixels", 720, "Height and width of the square images.", flag_values=FLAGS)
BATCH = flags.DEFINE_integer("batch", 8, "Images at once.", flag_values=FLAGS)
THREADS = flags.DEFINE_integer("threads", 2, "PyTorch's threads.", flag_values=FLAGS)
ROUNDS = flags.DEFINE_integer("rounds", 3, "Alternating measurements.", flag_values=FLAGS)

Score = Callable[[np.ndarray], np.ndarray]
"""Cosines `[B]` of images `[B, H, W, 3]`, uint8."""


def random_params(config: ClipConfig) -> Params:
    """Weights that keep activations of order one."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        scale = np.float32(leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.1)
        return jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32))

    return jax.tree.map(draw, clip_shapes(Clip(config)))


def ours(config: ClipConfig, params: Params, texts: np.ndarray) -> Score:
    """As `rewards/clip.py` scores."""
    clip = LoadedClip(Clip(config), params, Preprocess(config.vision.image_size), tokenize=lambda _: np.zeros((0, 8)))
    encode = ImageFeatures(clip, BATCH.value, make_mesh(MeshConfig()))
    return lambda images: np.asarray((encode(images / np.float32(255)) * texts).sum(-1))


def theirs(config: ClipConfig, params: Params, texts: np.ndarray) -> Score:
    """open_clip's transform and vision tower with the same weights."""
    define_missing_operators()
    import open_clip
    import torch
    from PIL import Image

    torch.set_num_threads(THREADS.value)
    vision, sizes = config.vision, config.vision.transformer
    tower = open_clip.transformer.VisionTransformer(
        vision.image_size, vision.patch_size, sizes.width, sizes.num_layers, sizes.num_heads,
        sizes.mlp_dim / sizes.width, output_dim=config.dim,
    ).eval()  # fmt: skip
    tensors = dict(tower.named_parameters())
    for name, array in export_tensors(open_clip_layout(config), params):
        if name.startswith("visual."):
            tensors[name.removeprefix("visual.")].data.copy_(torch.from_numpy(np.array(array)))
    transform = open_clip.image_transform(vision.image_size, is_train=False)
    vectors_of_texts = torch.from_numpy(texts)

    def score(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
            vectors = torch.nn.functional.normalize(tower(pixels), dim=-1)
            return (vectors * vectors_of_texts).sum(-1).numpy()

    return score


def inputs(config: ClipConfig) -> tuple[np.ndarray, np.ndarray]:
    """Images `[B, H, W, 3]`, uint8, of coarse squares, and unit vectors of texts `[B, D]`."""
    rng, side = np.random.default_rng(1), PIXELS.value // 12
    squares = rng.integers(0, 256, (BATCH.value, 13, 13, 3), np.uint8).repeat(side, 1).repeat(side, 2)
    texts = rng.standard_normal((BATCH.value, config.dim), np.float32)
    return squares[:, : PIXELS.value, : PIXELS.value], texts / np.linalg.norm(texts, axis=-1, keepdims=True)


def main() -> None:
    """Compares, times and prints."""
    config = CONFIGS[SIZE.value]
    images, texts = inputs(config)
    params = random_params(config)
    scorers = [make(config, params, texts) for make in (ours, theirs)]
    difference = np.abs(np.subtract(*(score(images) for score in scorers))).max()
    print(f"{SIZE.value}, batch {BATCH.value} of {PIXELS.value} x {PIXELS.value}; largest difference {difference:.1e}")
    if not difference <= 1e-4:
        raise AssertionError("not the same cosines")
    taken = np.zeros((ROUNDS.value, 2))
    for row in taken:
        for column, score in enumerate(scorers):
            start = time.perf_counter()
            score(images)
            row[column] = time.perf_counter() - start
    for who, column in zip(("ours", "theirs"), taken.T, strict=True):
        rate, flops = BATCH.value / np.median(column), BATCH.value * image_flops(config) / column.min()
        print(f"  {who:6}: median {np.median(column):.2f} s, {rate:.3f} images/s; at best {flops / 1e9:.0f} GFLOP/s")
    print(f"  images a second, ours / theirs: median of rounds {np.median(taken[:, 1] / taken[:, 0]):.2f}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
