"""The SD3.5 transformer of diffusers, small and with random weights: what ours is held against.

`python -m tests.oracle.sd3` writes tests/golden/sd3.npz.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.models.sd3 import Sd3, Sd3Config
from egrpo_jax.weights.layout import published_shapes
from egrpo_jax.weights.published.sd3 import config_to_diffusers, sd3_layout
from tests.layouts import import_tensors
from tests.oracle.flux import rounded_frequencies
from tests.oracle.random_weights import random_tensors

GOLDEN = Path(__file__).parent.parent / "golden" / "sd3.npz"
POSITIONS = "pos_embed.pos_embed"


@dataclasses.dataclass(frozen=True)
class Case:
    """A size of the model and of its inputs."""

    config: Sd3Config
    grid: tuple[int, int]
    text_tokens: int
    batch: int


CASES = {
    "medium": Case(
        Sd3Config(
            in_channels=16, num_blocks=4, num_dual_blocks=2, num_heads=2, head_dim=32, text_dim=24, pooled_dim=20,
            max_grid=9,
        ), grid=(4, 6), text_tokens=7, batch=2,
    ),
    "large": Case(
        Sd3Config(
            in_channels=12, num_blocks=3, num_dual_blocks=0, num_heads=3, head_dim=16, text_dim=20, pooled_dim=28,
            max_grid=8,
        ), grid=(5, 3), text_tokens=9, batch=3,
    ),
    "all_dual": Case(
        Sd3Config(
            in_channels=64, num_blocks=2, num_dual_blocks=1, num_heads=2, head_dim=64, text_dim=48, pooled_dim=32,
            max_grid=8,
        ), grid=(3, 8), text_tokens=5, batch=1,
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
        "pooled": rng.standard_normal((batch, config.pooled_dim)),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def cotangent(case):
    """What the velocity is multiplied with, before it is summed, wherever gradients are compared."""
    shape = (case.batch, case.grid[0] * case.grid[1], case.config.in_channels)
    return np.random.default_rng(8).standard_normal(shape).astype(np.float32)


def velocity(model, case, params, arguments):
    """Our velocity from arguments as `inputs` names them."""
    return model.apply({"params": params}, **arguments, grid=case.grid)


def template(case):
    """Our parameter tree, shapes alone."""
    init = lambda: Sd3(case.config).init(jax.random.key(0), **inputs(case), grid=case.grid)
    return jax.eval_shape(init)["params"]


def tensors(shapes):
    """A tensor for each name; the positions as large as what they are added to."""
    made = random_tensors(shapes)
    return made | {POSITIONS: made[POSITIONS] * np.sqrt(np.prod(shapes[POSITIONS])).astype(np.float32)}


def params(case):
    """Our parameter tree with the weights of `published_model`."""
    layout = sd3_layout(case.config)
    made = tensors(published_shapes(layout, template(case)))
    return jax.tree.map(jnp.asarray, import_tensors(layout, made, template(case)))


def published_model(config):
    """diffusers' model; every tensor is determined by its name and shape."""
    import torch
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel.from_config(config_to_diffusers(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.from_numpy(array) for name, array in tensors(shapes).items()}, strict=True)
    return model


def published_velocity(model, case, arguments):
    """The velocity of diffusers' model, from torch tensors named as ours are."""
    rows, columns = case.grid
    patches = arguments["latents"].unflatten(1, case.grid).unflatten(3, (-1, 2, 2))  # rows, columns, c, i, j
    image = patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    with rounded_frequencies():
        velocity = model(
            hidden_states=image,
            encoder_hidden_states=arguments["text"],
            pooled_projections=arguments["pooled"],
            timestep=1000 * arguments["time"],
            return_dict=False,
        )[0]
    patches = velocity.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # c, rows, i, columns, j
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def outputs(case):
    """Velocity and gradients by the inputs, as NumPy arrays; and the model, whose parameters hold theirs."""
    import torch

    model = published_model(case.config)
    arguments = {name: torch.from_numpy(array).requires_grad_() for name, array in inputs(case).items()}
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
