"""A miniature FLUX, adapters of it, and files that hold them."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from egrpo_jax.models.flux import Flux, FluxConfig
from egrpo_jax.models.lora import LoraConfig, init_lora
from egrpo_jax.weights.published.flux import flux_layout

SMALL = FluxConfig(
    in_channels=4, num_double_blocks=2, num_single_blocks=3, num_heads=2, head_dim=8, text_dim=6, pooled_dim=5,
    axes_dims=(2, 2, 4),
)  # fmt: skip
LAYOUT = flux_layout(SMALL, "diffusers")
BFL_LAYOUT = flux_layout(SMALL, "bfl")
TO_Q = "transformer_blocks.1.attn.to_q"


@functools.cache
def template(config=SMALL):
    """Shapes of the parameter tree."""
    arrays = (
        jnp.zeros((1, 1, config.in_channels)), jnp.ones(1), jnp.zeros((1, 1, config.text_dim)),
        jnp.zeros((1, config.pooled_dim)), jnp.ones(1),
    )  # fmt: skip
    return jax.eval_shape(lambda: Flux(config).init(jax.random.key(0), *arrays, grid=(1, 1)))["params"]


def random_like(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), tree)


def random_lora(targets=("",), rank=3):
    config = LoraConfig(rank=rank, targets=targets)
    return random_like(jax.eval_shape(lambda: init_lora(jax.random.key(0), template(), config)))


def adapter(module=TO_Q, inputs=16, outputs=16, rank=2, seed=0):
    """Two tensors of diffusers' names."""
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((rank, inputs)), rng.standard_normal((outputs, rank))
    names = (f"transformer.{module}.lora_A.weight", f"transformer.{module}.lora_B.weight")
    return dict(zip(names, (a.astype(np.float32), b.astype(np.float32)), strict=True))


def write(path, tensors, **metadata):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={key: json.dumps(value) for key, value in metadata.items()})
    return path


def delta(loaded, layer=1, path=("double_blocks", "image_qkv", "to_q")):
    """What an adapter that is applied with scale 2 adds to the kernel."""
    pair = loaded[path[0]][path[1]][path[2]]
    return 2 * pair["a"][layer] @ pair["b"][layer]
