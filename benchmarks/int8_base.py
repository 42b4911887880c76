"""The error of kernels in int8: velocities, images, and how samples compare by reward.

    python -m benchmarks.int8_base

Not of FLUX.1 itself: the embedded emoji model is FLUX's transformer, small, and its weights are trained. The kernels of
its blocks are stored as `model.published.int8_base` stores them. From the same noise all is held against the model in
float32: velocities at the latents of its anchors, images at the anchors' ends, and a rollout of configs/emoji.py, whose
groups are ranked by the reward that it trains on. Prints a table in Markdown.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from scipy.stats import spearmanr

from configs.emoji import EMOJI
from egrpo_jax import cli
from egrpo_jax.common.images import to_uint8
from egrpo_jax.data.prompts import read_prompts
from egrpo_jax.flow.solver import Euler, VelocityFn, solve, solve_path
from egrpo_jax.models.flux import Flux
from egrpo_jax.models.int8 import Int8, int8_kernels, quantise
from egrpo_jax.parallel.mesh import EXACT, MeshConfig, make_mesh
from egrpo_jax.pipelines import load_pipeline
from egrpo_jax.pipelines.families import FLUX
from egrpo_jax.rewards import load_reward
from egrpo_jax.rl.deal import deal_tails
from egrpo_jax.rl.rollout import roll_out
from egrpo_jax.rl.transitions import initial_noise, prompt_keys
from egrpo_jax.weights.assets import load_asset, read_flow

FLAGS = flags.FlagValues()
PROMPTS = flags.DEFINE_integer("prompts", 64, "Held-out prompts.", flag_values=FLAGS)

FLOW = read_flow()
PIPELINE = load_pipeline(EMOJI.model)
PLAN = EMOJI.plan.make_plan()
TIMES = jnp.array(PLAN.times, jnp.float32)
SHOWN = (0, 4, 6, 7)
"""Steps of the grid whose velocities are in the table."""


class Inputs(NamedTuple):
    """The same for all variants: the prompts' conditioning and keys, and latents `[T, P, N, D]` to look at."""

    text: Any
    keys: Any
    path: Any


class Found(NamedTuple):
    """A variant's velocities `[T, P, N, D]`, images of anchors `[P, H, W, 3]` in 8 bits, and scores `[P E R, G]`."""

    velocities: np.ndarray
    images: np.ndarray
    scores: np.ndarray


def velocity_in(dtype: Any) -> VelocityFn:
    """The emoji model, computing in `dtype`."""
    model = Flux(FLOW.config, dtype)
    return lambda params, latents, time, text: model.apply(
        {"params": params}, latents, time, text.states, text.pooled, grid=FLOW.grid
    )


def in_int8(params: Any) -> Any:
    """`params` with the kernels of their blocks in int8."""
    stored = lambda like, leaf: quantise(leaf) if isinstance(like, Int8) else leaf
    return jax.tree.map(
        stored, int8_kernels(FLOW.params, FLUX.blocks), params, is_leaf=lambda each: isinstance(each, Int8)
    )


def inputs(prompts: list[str], params: Any) -> Inputs:
    """Those of `prompts`; the latents are of the anchors by `params` in float32."""
    text = jax.tree.map(jnp.asarray, PIPELINE.encode(prompts))
    keys = prompt_keys(jax.random.key(0), 0, len(prompts))
    noise = initial_noise(keys, PIPELINE.latents_shape)
    walk = lambda params: solve_path(velocity_in(jnp.float32), params, noise, TIMES, text)[1]
    return Inputs(text, keys, jax.jit(walk)(params))


def run(velocity: VelocityFn, params: Any, given: Inputs, score: Callable[..., np.ndarray]) -> Found:
    """A variant's work; `score` takes images and the indices of their prompts."""
    tails, shape = deal_tails(PLAN, len(given.keys), 1), PIPELINE.latents_shape

    def compute(params: Any) -> tuple[Any, ...]:
        at = lambda step: velocity(params, step[0], jnp.broadcast_to(step[1], len(given.keys)), given.text)
        anchors = solve(Euler(), velocity, params, initial_noise(given.keys, shape), PLAN.times, given.text)
        ends = roll_out(velocity, params, PLAN, tails, given.text, given.keys, shape).latents
        images = (PIPELINE.decode(params, latents) for latents in (anchors, ends))
        return jax.lax.map(at, (given.path, TIMES[:-1])), *images

    velocities, anchors, ends = jax.jit(compute, compiler_options=EXACT)(params)
    scores = np.empty(len(tails.sample), np.float32)
    scores[tails.sample] = score(ends, tails.sample // PLAN.decodes)
    return Found(np.asarray(velocities), to_uint8(anchors), scores.reshape(-1, PLAN.group_size))


def row(name: str, found: Found, exact: Found) -> str:
    """A line of the table."""
    size = lambda velocities: np.linalg.norm(velocities, axis=(2, 3))
    error = (size(found.velocities - exact.velocities) / size(exact.velocities)).mean(1)
    levels = np.abs(found.images.astype(int) - exact.images)
    ranks = [spearmanr(*pair).statistic for pair in zip(found.scores, exact.scores, strict=True)]
    cells = [name, *(f"{100 * error[step]:.2f} %" for step in SHOWN)]
    cells += [f"{levels.mean():.2f}", f"{np.quantile(levels, 0.99):.0f}", f"{np.mean(ranks):.3f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Computes all variants and prints how far they are from float32."""
    prompts = read_prompts("emoji_heldout")[: PROMPTS.value]
    params, reward = load_asset(FLOW.path)[0], load_reward("emoji")
    score = lambda images, rows: reward(images, [prompts[row] for row in rows]).values
    in_bfloat16 = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    variants = {
        "bfloat16 weights": (jnp.float32, in_bfloat16),
        "int8 kernels": (jnp.float32, in_int8(params)),
        "bfloat16 weights, computed in bfloat16": (jnp.bfloat16, in_bfloat16),
        "int8 kernels, computed in bfloat16": (jnp.bfloat16, in_int8(in_bfloat16)),
    }
    with jax.set_mesh(make_mesh(MeshConfig())):
        given = inputs(prompts, params)
        exact = run(velocity_in(jnp.float32), params, given, score)
        columns = [*(f"t = {PLAN.times[step]:.2f}" for step in SHOWN), "image, mean", "99 %", "rank correlation"]
        print(f"| | {' | '.join(columns)} |\n|{'---|' * (1 + len(columns))}")
        for name, (dtype, stored) in variants.items():
            print(row(name, run(velocity_in(dtype), stored, given, score), exact), flush=True)


if __name__ == "__main__":
    cli.run(main, FLAGS)
