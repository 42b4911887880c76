"""The flow model: a small FLUX over patches of pixels, trained by flow matching on the emoji's images.

It is stopped on purpose before it has converged: reinforcement learning needs something left to learn.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Annotated, Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.common.ranges import Count, Range, Seed, Shift, check
from egrpo_jax.data.emoji import IMAGE_SIZE, catalogue, heldout_names, render
from egrpo_jax.flow.grid import shifted_times
from egrpo_jax.flow.solver import Euler, VelocityFn, solve
from egrpo_jax.models.flux import Flux, FluxConfig
from egrpo_jax.models.patches import latents_to_pixels, pixels_to_latents
from egrpo_jax.models.text_encoder import TextFeatures
from egrpo_jax.pretraining.loop import Optim, count, fit, rounded
from egrpo_jax.pretraining.towers import LICENSE
from egrpo_jax.rewards import load_reward
from egrpo_jax.text.emoji_encoder import encode_prompts
from egrpo_jax.weights.assets import load_asset, save_asset

Blocks = Annotated[int, Range(1, 1000)]


@dataclasses.dataclass(frozen=True)
class FlowJob:
    """Flow matching of the embedded model.

    Attributes:
      kind: what is trained.
      seed: of parameters, batches, times and noise.
      start_from: file of a smaller flow, written by an earlier job, to go on from; blocks that it lacks are added.
      num_heads: of attention, 32 channels each.
      num_double_blocks, num_single_blocks: of the model.
      patch: pixels on a side of an image token.
      shift: of the training times; see `flow.grid.shifted_times`.
      evaluate_every: steps between evaluations, each of which writes the model.
      target_recall: R@1 of the judge on held-out names at which training stops, even if steps are left.
      optim: how it is trained.
    """

    kind: Literal["flow"] = "flow"
    seed: Seed = 0
    start_from: str | None = None
    num_heads: Annotated[int, Range(1, 1000)] = 4
    num_double_blocks: Blocks = 1
    num_single_blocks: Blocks = 3
    patch: Annotated[int, Range(1, IMAGE_SIZE)] = 4
    shift: Shift = 2.0
    evaluate_every: Count = 100
    target_recall: Annotated[float, Range(0, 1)] = 0.35
    optim: Optim = dataclasses.field(default_factory=lambda: Optim(steps=4000, batch_size=64, warmup=200, decay=False))

    def __post_init__(self) -> None:
        check(self)
        if IMAGE_SIZE % self.patch:
            raise ConfigError("patch", self.patch, f"a divisor of {IMAGE_SIZE}")


def flow_matching_loss(
    velocity_fn: VelocityFn,
    params: chex.ArrayTree,
    data: chex.Array,
    conditioning: TextFeatures,
    key: chex.PRNGKey,
    shift: float,
) -> chex.Array:
    """Mean squared error of the velocity at x_t = (1 - t) data + t noise against noise - data.

    Args:
      velocity_fn, params: the model.
      data: clean latents `[B, N, D]`.
      conditioning: of leading axis B.
      key: draws noise and times.
      shift: s of the time density, uniform u mapped to s u / (1 + (s - 1) u).
    """
    noise_key, time_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, data.shape)
    uniform = jax.random.uniform(time_key, data.shape[:1])
    time = shift * uniform / (1 + (shift - 1) * uniform)
    level = time[:, None, None]
    velocity = velocity_fn(params, (1 - level) * data + level * noise, time, conditioning)
    return jnp.square(velocity - (noise - data)).mean()


def train(job: FlowJob, output: str | os.PathLike[str]) -> dict[str, float]:
    """Trains the flow model until the judge recognises enough of its images, and writes it to `output`.

    Returns:
      Parameters, steps taken, and R@1 and R@10 of the judge on held-out names (8 Euler steps, shift 3), for the
      weights as the file gives them back.
    """
    emojis = catalogue()
    latents = pixels_to_latents(jnp.asarray(render(emojis), jnp.float32) / 255, job.patch)
    text = jax.tree.map(jnp.asarray, encode_prompts([emoji.name for emoji in emojis]))
    # At length 1 the pooled vectors are faint beside the embedding of the time, and the flow takes twice as long to
    # learn from them: it trains on entries of variance 1, and the factor goes into the weights that are written.
    scale = text.pooled.shape[-1] ** 0.5
    text = text._replace(pooled=scale * text.pooled)
    grid = (IMAGE_SIZE // job.patch, IMAGE_SIZE // job.patch)
    config = _model_config(job, latents, text)
    # Unrolled, the backward pass is a fifth faster on CPU, and blocks are too few to make compiling slow.
    model = Flux(config, unroll=max(job.num_double_blocks, job.num_single_blocks))

    def velocity_fn(params: chex.ArrayTree, x: chex.Array, time: chex.Array, features: TextFeatures) -> chex.Array:
        return model.apply({"params": params}, x, time, features.states, features.pooled, grid=grid)

    def loss_fn(params: chex.ArrayTree, data: tuple[chex.Array, TextFeatures], key: chex.PRNGKey) -> chex.Array:
        choice_key, loss_key = jax.random.split(key)
        chosen = jax.random.randint(choice_key, (job.optim.batch_size,), 0, len(data[0]))
        clean, conditioning = jax.tree.map(lambda array: array[chosen], data)
        return flow_matching_loss(velocity_fn, params, clean, conditioning, loss_key, job.shift)

    init_key, fit_key, test_key = jax.random.split(jax.random.key(job.seed), 3)
    first = jax.tree.map(lambda array: array[:1], text)
    params = model.init(init_key, latents[:1], jnp.ones(1), first.states, first.pooled, grid=grid)["params"]
    if job.start_from is not None:
        params = grown(params, absorb_scale(load_asset(job.start_from)[0], 1 / scale), job.start_from)
    evaluate = _evaluation(velocity_fn, latents.shape[1:], grid, job.patch, test_key)
    metadata = {"config": dataclasses.asdict(config), "patch": job.patch, "grid": grid, "license": LICENSE}
    for step, average in fit(loss_fn, params, (latents, text), job.optim, fit_key):
        if step % job.evaluate_every and step != job.optim.steps:
            continue
        shipped = rounded(absorb_scale(average, scale))
        scores = evaluate(shipped)
        tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        save_asset(output, shipped, metadata | {"step": step, "scores": scores})
        if scores["judge_recall_1"] >= job.target_recall:
            break
    return {"parameters": count(params), "steps": step} | scores


def absorb_scale(params: Any, scale: float) -> Any:
    """`params` of the same flow for pooled vectors that are `scale` times shorter."""
    path = ("pooled_in", "linear_1", "kernel")
    flat = flatten_dict(params)
    return unflatten_dict(flat | {path: flat[path] * scale})


def grown(params: Any, smaller: Any, source: str) -> Any:
    """Freshly initialised `params` with the weights of a `smaller` flow put in: the velocity is the smaller flow's.

    Blocks that the smaller flow lacks come after its own, and adaLN-zero starts them as the identity.

    Raises:
      UserError: the flow, read from `source`, differs in more than the number of blocks.
    """
    flat, known = flatten_dict(params), flatten_dict(smaller)
    for path, initial in flat.items():
        found = known.get(path, np.zeros(0))
        stacked = path[0] in ("double_blocks", "single_blocks")
        if found.shape[stacked:] != initial.shape[stacked:] or len(found) > len(initial):
            raise UserError(
                f"{source}: {'/'.join(path)} has the shape {found.shape}, expected {initial.shape} (of blocks, fewer "
                "will do); choose the sizes of that flow"
            )
        flat[path] = jnp.concatenate([found, initial[len(found) :]])
    return unflatten_dict(flat)


def _model_config(job: FlowJob, latents: chex.Array, text: TextFeatures) -> FluxConfig:
    return FluxConfig(
        in_channels=latents.shape[-1],
        num_double_blocks=job.num_double_blocks,
        num_single_blocks=job.num_single_blocks,
        num_heads=job.num_heads,
        head_dim=32,
        text_dim=text.states.shape[-1],
        pooled_dim=text.pooled.shape[-1],
        guidance_embed=False,
        axes_dims=(8, 12, 12),
    )


def _evaluation(
    velocity_fn: VelocityFn, shape: tuple[int, ...], grid: tuple[int, int], patch: int, key: chex.PRNGKey
) -> Callable[[chex.ArrayTree], dict[str, float]]:
    """A function from parameters to the judge's recall on the held-out names, with noise fixed by `key`."""
    names = heldout_names()
    conditioning = encode_prompts(names)
    noise = jax.random.normal(key, (len(names), *shape))
    times = shifted_times(8, shift=3.0)
    rewards = {f"judge_recall_{top}": load_reward(f"emoji_judge_r{top}") for top in (1, 10)}

    @jax.jit
    def sample(params: chex.ArrayTree) -> chex.Array:
        return latents_to_pixels(solve(Euler(), velocity_fn, params, noise, times, conditioning), grid, patch)

    def evaluate(params: chex.ArrayTree) -> dict[str, float]:
        images = sample(params)
        return {name: float(reward(images, names).mean()) for name, reward in rewards.items()}

    return evaluate
