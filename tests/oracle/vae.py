"""The autoencoder of diffusers, small and with random weights: what ours is held against.

`python -m tests.oracle.vae` writes tests/golden/vae.npz.
"""

import dataclasses
from pathlib import Path

import numpy as np

from egrpo_jax.models.vae import VaeConfig
from tests.oracle.random_weights import random_tensors

GOLDEN = Path(__file__).parent.parent / "golden" / "vae.npz"


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of the model, its latents `[batch, *latent_size, C]`, and the tiles that it decodes them in, in latents."""

    config: VaeConfig
    batch: int
    latent_size: tuple[int, int]
    tile: int


CASES = {
    "two_levels": Case(
        VaeConfig(block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4),
        batch=2, latent_size=(6, 11), tile=4,
    ),
    "three_levels": Case(
        VaeConfig(block_out_channels=(8, 24, 16), layers_per_block=2, latent_channels=3, norm_num_groups=8),
        batch=1, latent_size=(9, 5), tile=8,
    ),
    "four_levels": Case(
        VaeConfig(block_out_channels=(32, 32, 64, 64)),
        batch=1, latent_size=(2, 5), tile=4,
    ),
}  # fmt: skip


def inputs(case, seed=7):
    """Latents `[B, h, w, C]`."""
    rng = np.random.default_rng(seed)
    height, width = (case.config.stride * size for size in case.latent_size)
    rng.uniform(-1, 1, (case.batch, height, width, 3))  # the golden's latents are the generator's next numbers
    latents = rng.standard_normal((case.batch, *case.latent_size, case.config.latent_channels))
    return latents.astype(np.float32)


def published_model(case):
    """diffusers' model; every tensor is determined by its name and shape."""
    import torch
    from diffusers import AutoencoderKL

    levels = len(case.config.block_out_channels)
    model = AutoencoderKL(
        **dataclasses.asdict(case.config),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=case.config.stride * case.tile,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {name: torch.from_numpy(array) for name, array in random_tensors(shapes).items()}
    model.load_state_dict(tensors, strict=True)
    return model


def to_torch(array):
    """`[B, H, W, C]` to `[B, C, H, W]`."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def to_numpy(tensor):
    """`[B, C, H, W]` to `[B, H, W, C]`, float32."""
    return tensor.detach().float().numpy().transpose(0, 2, 3, 1)


def outputs(case, model, seed=7):
    """What `model` makes of the case's inputs, in its own dtype."""
    return {"images": to_numpy(model.decode(to_torch(inputs(case, seed)).to(model.dtype)).sample)}


def cases():
    """Every case's arrays by name: in float32, decoded in tiles too, and (`bf16_*`) in bfloat16."""
    import torch

    named = {}
    for name, case in CASES.items():
        model = published_model(case)
        with torch.no_grad():
            arrays = outputs(case, model)
            arrays["tiled_images"] = to_numpy(model.tiled_decode(to_torch(inputs(case))).sample)
            halved = outputs(case, model.to(torch.bfloat16))
        named[name] = arrays | {f"bf16_{key}": array for key, array in halved.items()}
    return named


def main():
    arrays = {f"{case}/{name}": array for case, named in cases().items() for name, array in named.items()}
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
