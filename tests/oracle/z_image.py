"""The Z-Image transformer of diffusers, small and with random weights: what ours is held against.

`python -m tests.oracle.z_image` writes tests/golden/z_image.npz.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.models.z_image import ZImage, ZImageConfig
from egrpo_jax.weights.layout import published_shapes
from egrpo_jax.weights.published.z_image import config_to_diffusers, z_image_layout
from tests.layouts import import_tensors
from tests.oracle.flux import rounded_frequencies
from tests.oracle.random_weights import random_tensors
from tests.oracle.torchvision_shim import define_missing_operators

GOLDEN = Path(__file__).parent.parent / "golden" / "z_image.npz"


@dataclasses.dataclass(frozen=True)
class Case:
    """A size of the model and of its inputs; the text's array has `text_tokens` for prompts of `lengths`."""

    config: ZImageConfig
    grid: tuple[int, int]
    text_tokens: int
    lengths: tuple[int, ...]

    @property
    def batch(self):
        return len(self.lengths)


CASES = {
    "many_lengths": Case(
        ZImageConfig(
            in_channels=16, num_layers=2, num_refiner_layers=1, num_heads=2, head_dim=24, text_dim=20,
            axes_dims=(8, 8, 8), axes_lens=(128, 16, 16),
        ), grid=(5, 3), text_tokens=96, lengths=(5, 40, 32),
    ),
    "no_padding": Case(
        ZImageConfig(
            in_channels=12, num_layers=3, num_refiner_layers=2, num_heads=4, head_dim=16, text_dim=28,
            axes_dims=(4, 6, 6), axes_lens=(80, 9, 9), theta=100.0, epsilon=1e-3,
        ), grid=(4, 8), text_tokens=64, lengths=(64, 64),
    ),
    "head_128": Case(
        ZImageConfig(
            in_channels=64, num_layers=1, num_refiner_layers=1, num_heads=3, text_dim=48, axes_lens=(1536, 512, 512),
        ), grid=(3, 11), text_tokens=33, lengths=(7, 33),
    ),
}  # fmt: skip


def inputs(case):
    """Arguments of the model by name."""
    rng = np.random.default_rng(7)
    config, batch = case.config, case.batch
    arrays = {
        "latents": rng.standard_normal((batch, case.grid[0] * case.grid[1], config.in_channels)),
        "time": rng.uniform(0.02, 1, batch),
        "text": rng.standard_normal((batch, case.text_tokens, config.text_dim)),
    }
    lengths = np.array(case.lengths, np.int32)
    return {**{name: array.astype(np.float32) for name, array in arrays.items()}, "lengths": lengths}


def real(arguments):
    """The arguments that have gradients."""
    return {name: array for name, array in arguments.items() if name != "lengths"}


def cotangent(case):
    """What the velocity is multiplied with, before it is summed, wherever gradients are compared."""
    shape = (case.batch, case.grid[0] * case.grid[1], case.config.in_channels)
    return np.random.default_rng(8).standard_normal(shape).astype(np.float32)


def velocity(model, case, params, arguments):
    """Our velocity from `real` arguments."""
    return model.apply({"params": params}, **arguments, lengths=np.array(case.lengths, np.int32), grid=case.grid)


def template(case):
    """Our parameter tree, shapes alone."""
    init = lambda: ZImage(case.config).init(jax.random.key(0), **inputs(case), grid=case.grid)
    return jax.eval_shape(init)["params"]


def params(case):
    """Our parameter tree with the weights of `published_model`."""
    layout = z_image_layout(case.config, "diffusers")
    tensors = random_tensors(published_shapes(layout, template(case)))
    return jax.tree.map(jnp.asarray, import_tensors(layout, tensors, template(case)))


def published_model(config):
    """diffusers' model; every tensor is determined by its name and shape."""
    import torch

    define_missing_operators()
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel.from_config(config_to_diffusers(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {name: torch.from_numpy(array) for name, array in random_tensors(shapes).items()}
    model.load_state_dict(tensors, strict=True)
    return model


def published_velocity(model, case, arguments):
    """The velocity of diffusers' model, as its pipeline makes it, from torch tensors named as ours are."""
    import torch

    images = [_image(tokens, case.grid) for tokens in arguments["latents"]]
    prompts = [text[:length] for text, length in zip(arguments["text"], case.lengths, strict=True)]
    with rounded_frequencies():
        outputs = model(images, 1 - arguments["time"], prompts, return_dict=False)[0]
    return -torch.stack([_tokens(output, case.grid) for output in outputs])


def _image(tokens, grid):
    """Tokens `[N, 4 C]` as latents `[C, frames, height, width]`."""
    cells = tokens.reshape(*grid, -1, 2, 2).permute(2, 0, 3, 1, 4)
    return cells.reshape(cells.shape[0], 1, 2 * grid[0], 2 * grid[1])


def _tokens(image, grid):
    cells = image.reshape(-1, grid[0], 2, grid[1], 2).permute(1, 3, 0, 2, 4)
    return cells.reshape(grid[0] * grid[1], -1)


def outputs(case):
    """Velocity and gradients by the inputs, as NumPy arrays; and the model, whose parameters hold theirs."""
    import torch

    model = published_model(case.config)
    arguments = {name: torch.from_numpy(array).requires_grad_() for name, array in real(inputs(case)).items()}
    velocity = published_velocity(model, case, arguments)
    (velocity * torch.from_numpy(cotangent(case))).sum().backward()
    gradients = {f"gradient_{name}": tensor.grad.numpy() for name, tensor in arguments.items()}
    return {"velocity": velocity.detach().numpy(), **gradients}, model


def cases():
    """Every case's arrays by name."""
    return {name: outputs(case)[0] for name, case in CASES.items()}


def main():
    """Writes the golden file."""
    arrays = {f"{case}/{name}": array for case, named in cases().items() for name, array in named.items()}
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
