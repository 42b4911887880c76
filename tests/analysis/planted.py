"""A flow and a reward of which everything that an analysis measures is known: v = c(t) x + w, R = b z + q |z|^2 of the
end z of the flow."""

import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.pipelines import Pipeline
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.optimizer import OptimConfig
from egrpo_jax.training.config import EvaluationConfig, RewardsConfig, TrainConfig

SHAPE = (4, 3)
SIZE = 12
SLOPE, BEND = 1.0, 0.3
SCALE = 0.04
"""A pixel by a latent: small, since 8 bits are a floor."""
GROWTH = 0.4
FORGOTTEN = 0.8
"""Up to this time the forgetful flow forgets all that it was."""


def growth(forgets, time, next_time):
    """c; a step with c = 1 / dt ends at w alone."""
    return jnp.where(forgets & (time > FORGOTTEN) & (next_time <= FORGOTTEN), 1 / (time - next_time), GROWTH)


def pipeline_of(forgets, times=None, scale=SCALE):
    def velocity(params, latents, time, conditioning):
        del conditioning
        c = GROWTH
        if forgets:
            grid = jnp.array(times)
            following = grid[jnp.minimum(jnp.abs(grid[:, None] - time).argmin(0) + 1, len(times) - 1)]
            c = growth(True, time, following)[:, None, None]
        return c * latents + params["w"]

    params = {"w": np.zeros(SHAPE, np.float32)}
    return Pipeline(
        velocity=velocity,
        abstract_params=jax.eval_shape(lambda: params),
        read=lambda _: params,
        encode=lambda prompts: {"none": np.zeros((len(prompts), 1), np.float32)},
        decode=lambda _, latents: 0.5 + scale * latents.reshape(-1, 2, 2, 3),
        latents_shape=SHAPE,
    )


def pipeline(_):
    return pipeline_of(forgets=False)


def forgetful(_):
    return pipeline_of(forgets=True, times=EGrpo(num_steps=6).times)


def faint(_):
    """Whose images differ by less than 8 bits tell."""
    return pipeline_of(forgets=False, scale=1e-4)


def ends(images, scale=SCALE):
    return (images.reshape(len(images), -1) - 0.5) / scale


def linear(images, prompts):
    del prompts
    return SLOPE * ends(images).mean(1)


def quadratic(images, prompts):
    return linear(images, prompts) + BEND * (ends(images) ** 2).mean(1)


def of_faint(images, prompts):
    del prompts
    return ends(images, 1e-4).mean(1)


def judge(images, prompts):
    """Of half of the pixels."""
    del prompts
    return ends(images)[:, : SIZE // 2].mean(1)


def config(model="pipeline", reward="linear", heldout=(), **plan):
    made = TrainConfig(
        name="planted",
        prompts_per_iteration=4,
        rewards=RewardsConfig(
            train=(f"tests.analysis.planted:{reward}",),
            heldout=tuple(f"tests.analysis.planted:{name}" for name in heldout),
        ),
        plan=EGrpo(**{"num_steps": 6, "group_size": 32, "tail_strides": (1,)} | plan),
        optim=OptimConfig(learning_rate=1e-3),
        evaluation=EvaluationConfig(batch=4),
    )
    object.__setattr__(made.model, "name", f"tests.analysis.planted:{model}")
    return made
