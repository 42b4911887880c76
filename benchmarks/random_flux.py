"""FLUX transformers with random weights, ours and diffusers' with the same, and training jobs around ours."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from egrpo_jax.common.trees import partition
from egrpo_jax.models.flux import Flux, FluxConfig, forward_flops, position_ids
from egrpo_jax.models.layers import Remat
from egrpo_jax.models.lora import COLLECTION, LoraConfig, apply_lora, init_lora
from egrpo_jax.pipelines import Pipeline
from egrpo_jax.pipelines.families import FLUX
from egrpo_jax.rewards import CheckedReward
from egrpo_jax.rl.optimizer import make_optimizer
from egrpo_jax.rl.update import init_state
from egrpo_jax.training.config import RewardsConfig, TrainConfig
from egrpo_jax.training.job import Job
from egrpo_jax.training.state import Progress
from egrpo_jax.weights.layout import Params, export_tensors
from egrpo_jax.weights.published.flux import config_to_diffusers, flux_layout
from tests.oracle.torchvision_shim import define_missing_operators

if TYPE_CHECKING:
    import torch

SMALL = FluxConfig(
    num_double_blocks=2, num_single_blocks=4, num_heads=4, head_dim=64, text_dim=256, pooled_dim=128,
    axes_dims=(16, 24, 24),
)  # fmt: skip
GUIDANCE = 3.5
REWARD = "brightness"


def random_params(config: FluxConfig, dtype: Any) -> Params:
    """Weights that keep activations of order one, made on the device, so that 12 billion never lie in host memory."""
    leaves, tree = jax.tree.flatten(FLUX.shapes(config))
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))  # compiles sooner than the default
    return jax.tree.unflatten(tree, [_draw(key, leaf.shape, dtype) for key, leaf in zip(keys, leaves, strict=True)])


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    scale = shape[-2] ** -0.5 if len(shape) > 1 else 0.1
    return jax.random.uniform(key, shape, dtype, -scale, scale) * 3**0.5


def diffusers_model(config: FluxConfig, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """diffusers' model on `device`, its weights not set; raises ImportError without PyTorch."""
    import torch

    define_missing_operators()
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config_to_diffusers(config))
    return model.to_empty(device=device).to(dtype)


def copy_weights(config: FluxConfig, params: Params, model: torch.nn.Module) -> None:
    """Gives diffusers' `model` our weights `params`."""
    import torch

    tensors = dict(model.named_parameters())
    for name, array in export_tensors(flux_layout(config, "diffusers"), params):
        tensors[name].data.copy_(torch.from_numpy(np.array(array, np.float32)))


def token_ids(text_tokens: int, grid: tuple[int, int], device: str) -> dict[str, torch.Tensor]:
    """Positions of text and image tokens, by the names of diffusers' arguments."""
    import torch

    ids = torch.from_numpy(position_ids(text_tokens, grid)).to(device, torch.float32)
    return {"img_ids": ids[text_tokens:], "txt_ids": ids[:text_tokens]}


@dataclasses.dataclass(frozen=True)
class Shape:
    """A FLUX transformer and the tokens that it is given."""

    config: FluxConfig
    grid: tuple[int, int]
    text_tokens: int

    @property
    def latents(self) -> tuple[int, int]:
        """(N, D) of the latents."""
        return self.grid[0] * self.grid[1], self.config.in_channels

    @property
    def flops(self) -> int:
        """Operations of one forward pass of one sample."""
        return forward_flops(self.config, self.latents[0], self.text_tokens)

    def conditioning(self, count: int) -> dict[str, np.ndarray]:
        """Random text for `count` prompts, float32, by the names of our model's arguments."""
        rng = np.random.default_rng(count)
        return {
            "text": rng.standard_normal((count, self.text_tokens, self.config.text_dim), np.float32),
            "pooled": rng.standard_normal((count, self.config.pooled_dim), np.float32),
        }


def random_pipeline(
    shape: Shape, dtype: str, param_dtype: str, remat: Remat = "none", lora: LoraConfig | None = None
) -> Pipeline:
    """A pipeline as that of FLUX.1, with random weights and text; its decoder only squashes three channels."""
    model = Flux(shape.config, jnp.dtype(dtype), remat=remat)
    flow = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype), FLUX.shapes(shape.config))

    def velocity(params: Any, latents: chex.Array, time: chex.Array, conditioning: Any) -> chex.Array:
        inputs = {"latents": latents, "time": time, **conditioning, "guidance": jnp.full(time.shape, GUIDANCE)}
        variables = {"params": params["flow"]}
        if lora is None:
            return model.apply(variables, **inputs, grid=shape.grid)
        return apply_lora(
            model, variables | {COLLECTION: params[COLLECTION]}, **inputs, grid=shape.grid, scale=lora.scale
        )

    adapters = {} if lora is None else {COLLECTION: lambda: init_lora(jax.random.key(0), flow, lora)}
    makers = {"flow": lambda: random_params(shape.config, param_dtype), **adapters}
    return Pipeline(
        velocity=velocity,
        abstract_params={"flow": flow} | {name: jax.eval_shape(make) for name, make in adapters.items()},
        read=lambda wanted: {name: makers[name]() for name in wanted},
        encode=lambda prompts: shape.conditioning(len(prompts)),
        decode=lambda _, latents: jax.nn.sigmoid(latents[..., :3]).reshape(-1, *shape.grid, 3),
        latents_shape=shape.latents,
        rules=FLUX.rules,
        dtype=jnp.dtype(dtype),
        trainable="^flow/" if lora is None else f"^{COLLECTION}/",
        forward_flops=shape.flops,
    )


def training_job(pipeline: Pipeline, config: TrainConfig) -> Job:
    """A job on `pipeline`; the mean of an image is its reward."""
    config = dataclasses.replace(config, rewards=RewardsConfig(train=(REWARD,)))
    prompts = [f"prompt {index}" for index in range(config.prompts_per_iteration)]
    reward = CheckedReward(REWARD, lambda images, _: images.mean((1, 2, 3)))
    optimizer = make_optimizer(config.optim)
    return Job(config, config.plan.make_plan(), pipeline, {REWARD: reward}, prompts, [], optimizer)


def first_progress(job: Job, mesh: Mesh) -> tuple[Progress, Any]:
    """The beginning of a run, and the parameters that are not trained."""
    trained, frozen = partition(job.pipeline.load(mesh), job.pipeline.trainable)
    rest = jax.jit(lambda params: init_state(params, job.optimizer, job.config.learner)._replace(params=None))
    return Progress(rest(trained)._replace(params=trained), jax.random.key(0), iteration=0, position=0), frozen
