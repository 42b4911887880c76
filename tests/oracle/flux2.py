"""The FLUX.2 transformer of diffusers, small and with random weights: what ours is held against.

`python -m tests.oracle.flux2` writes tests/golden/flux2.npz.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.models.flux2 import Flux2, Flux2Config
from egrpo_jax.weights.layout import published_shapes
from egrpo_jax.weights.published.flux2 import config_to_diffusers, flux2_layout
from tests.layouts import import_tensors
from tests.oracle.flux import rounded_frequencies
from tests.oracle.random_weights import random_tensors

GOLDEN = Path(__file__).parent.parent / "golden" / "flux2.npz"


@dataclasses.dataclass(frozen=True)
class Case:
    """A size of the model and of its inputs."""

    config: Flux2Config
    grid: tuple[int, int]
    text_tokens: int
    batch: int


CASES = {
    "klein": Case(
        Flux2Config(
            in_channels=16, num_double_blocks=2, num_single_blocks=3, num_heads=2, head_dim=32, text_dim=24,
            axes_dims=(8, 8, 8, 8),
        ), grid=(4, 6), text_tokens=7, batch=2,
    ),
    "dev": Case(
        Flux2Config(
            in_channels=12, num_double_blocks=1, num_single_blocks=2, num_heads=3, head_dim=16, text_dim=20,
            guidance_embed=True, axes_dims=(2, 6, 4, 4), theta=500.0, mlp_ratio=2,
        ), grid=(5, 3), text_tokens=9, batch=3,
    ),
    "head_128": Case(
        Flux2Config(in_channels=128, num_double_blocks=1, num_single_blocks=1, num_heads=2, text_dim=48),
        grid=(3, 8), text_tokens=5, batch=1,
    ),
}  # fmt: skip


def inputs(case):
    """Arguments of the model by name; guidance only where the model takes it."""
    rng = np.random.default_rng(7)
    config, batch = case.config, case.batch
    arrays = {
        "latents": rng.standard_normal((batch, case.grid[0] * case.grid[1], config.in_channels)),
        "time": rng.uniform(0.02, 1, batch),
        "text": rng.standard_normal((batch, case.text_tokens, config.text_dim)),
    }
    if config.guidance_embed:
        arrays["guidance"] = rng.uniform(1, 5, batch)
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
    init = lambda: Flux2(case.config).init(jax.random.key(0), **inputs(case), grid=case.grid)
    return jax.eval_shape(init)["params"]


def params(case):
    """Our parameter tree with the weights of `published_model`."""
    layout = flux2_layout(case.config, "diffusers")
    tensors = random_tensors(published_shapes(layout, template(case)))
    return jax.tree.map(jnp.asarray, import_tensors(layout, tensors, template(case)))


def published_model(config):
    """diffusers' model; every tensor is determined by its name and shape."""
    import torch
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel.from_config(config_to_diffusers(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {name: torch.from_numpy(array) for name, array in random_tensors(shapes).items()}
    model.load_state_dict(tensors, strict=True)
    return model


def published_velocity(model, case, arguments):
    """The velocity of diffusers' model, from torch tensors named as ours are, at the positions its pipeline gives."""
    import torch
    from diffusers import Flux2KleinPipeline

    channels = torch.zeros(1, 1, *case.grid)
    with rounded_frequencies():
        return model(
            hidden_states=arguments["latents"],
            encoder_hidden_states=arguments["text"],
            timestep=arguments["time"],
            img_ids=Flux2KleinPipeline._prepare_latent_ids(channels),
            txt_ids=Flux2KleinPipeline._prepare_text_ids(arguments["text"]),
            guidance=arguments.get("guidance"),
            return_dict=False,
        )[0]


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
