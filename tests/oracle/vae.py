"""The autoencoders of diffusers, small and with random weights: what ours are held against.

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
    """Sizes of the model, its latents `[batch, *latent_size, C]`, and the tiles that it decodes them in, in latents.

    FLUX.2's encoder may have widths of its own, `encoder_channels`.
    """

    config: VaeConfig
    batch: int
    latent_size: tuple[int, int]
    tile: int
    encoder_channels: tuple[int, ...] | None = None

    @property
    def grid(self):
        """Rows and columns of tokens."""
        height, width = self.latent_size
        return height // 2, width // 2


FLUX2 = VaeConfig(
    latent_channels=32, scaling_factor=1.0, shift_factor=0.0, use_post_quant_conv=True, batch_norm_eps=1e-4
)
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
    "flux2": Case(
        dataclasses.replace(
            FLUX2, block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4
        ),
        batch=2, latent_size=(6, 10), tile=4,
    ),
    "flux2_small_decoder": Case(
        dataclasses.replace(
            FLUX2, block_out_channels=(8, 16, 24), latent_channels=6, norm_num_groups=8, batch_norm_eps=1e-3
        ),
        batch=1, latent_size=(4, 10), tile=4, encoder_channels=(16, 24, 40),
    ),
}  # fmt: skip


def inputs(case, seed=7):
    """Latents `[B, h, w, C]`."""
    rng = np.random.default_rng(seed)
    height, width = (case.config.stride * size for size in case.latent_size)
    rng.uniform(-1, 1, (case.batch, height, width, 3))  # the golden's latents are the generator's next numbers
    latents = rng.standard_normal((case.batch, *case.latent_size, case.config.latent_channels))
    return latents.astype(np.float32)


def tokens(case, seed=7):
    """Tokens `[B, N, 4 C]` as a flow model makes them."""
    shape = (case.batch, case.grid[0] * case.grid[1], 4 * case.config.latent_channels)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def published_model(case):
    """diffusers' model; every tensor is determined by its name and shape."""
    import diffusers
    import torch

    keys = dataclasses.asdict(case.config)
    levels = len(case.config.block_out_channels)
    keys |= {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    keys |= {"sample_size": case.config.stride * case.tile}
    if keys["batch_norm_eps"] is None:
        del keys["batch_norm_eps"]
        model = diffusers.AutoencoderKL(**keys, use_quant_conv=False)
    else:
        del keys["scaling_factor"], keys["shift_factor"]
        if case.encoder_channels is not None:
            keys["decoder_block_out_channels"], keys["block_out_channels"] = (
                keys["block_out_channels"],
                case.encoder_channels,
            )
        model = diffusers.AutoencoderKLFlux2(**keys)
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()}
    tensors = {name: torch.from_numpy(array) for name, array in random_tensors(shapes).items()}
    model.load_state_dict(state | tensors, strict=True)
    return model


def to_torch(array):
    """`[B, H, W, C]` to `[B, C, H, W]`."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def to_numpy(tensor):
    """`[B, C, H, W]` to `[B, H, W, C]`, float32."""
    return tensor.detach().float().numpy().transpose(0, 2, 3, 1)


def outputs(case, model, seed=7):
    """What `model` makes of the case's inputs, in its own dtype; of FLUX.2's also what its pipeline makes of tokens."""
    import torch

    images = {"images": to_numpy(model.decode(to_torch(inputs(case, seed)).to(model.dtype)).sample)}
    if case.config.batch_norm_eps is not None:
        images["token_images"] = pipeline_images(model, torch.from_numpy(tokens(case, seed)).to(model.dtype), case.grid)
    return images


def pipeline_images(model, tokens, grid):
    """Images `[B, H, W, 3]` in [0, 1] of tokens, as `Flux2KleinPipeline` makes them of its last ones."""
    import torch
    from diffusers import Flux2KleinPipeline
    from diffusers.image_processor import VaeImageProcessor

    ids = Flux2KleinPipeline._prepare_latent_ids(torch.zeros(len(tokens), 1, *grid))
    latents = Flux2KleinPipeline._unpack_latents_with_ids(tokens, ids, *grid)
    mean = model.bn.running_mean.view(1, -1, 1, 1)
    deviation = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
    latents = Flux2KleinPipeline._unpatchify_latents(latents * deviation + mean)
    return VaeImageProcessor().postprocess(model.decode(latents).sample.detach(), output_type="np")


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
