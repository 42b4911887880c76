"""A small analytic flow model, pipeline and rewards: every count, gradient and sample can be checked by hand."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.pipelines import Pipeline
from egrpo_jax.rl.algorithms.base import Algorithm
from egrpo_jax.rl.algorithms.egrpo import EGrpo
from egrpo_jax.rl.learner import LearnerConfig
from egrpo_jax.rl.optimizer import OptimConfig
from egrpo_jax.training.config import CheckpointConfig, EvaluationConfig, RewardsConfig, TrainConfig, train_config

SHAPE = (6, 5)
"""(N, D) of its latents."""


def params(seed=0, width=5):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "mix": jax.random.normal(keys[0], (width, width)) * 0.3,
        "time": jax.random.normal(keys[1], (width,)),
        "text": jax.random.normal(keys[2], (3, width)),
    }


def conditioning(num_prompts, seed=1):
    return {"text": jax.random.normal(jax.random.key(seed), (num_prompts, 3))}


def velocity(params, latents, time, conditioning):
    text = (conditioning["text"] @ params["text"])[:, None]
    return jnp.tanh(latents @ params["mix"] + time[:, None, None] * params["time"] + text)


SMALL = {
    "egrpo": {"num_steps": 6, "group_size": 4},
    "g2rpo": {"num_steps": 6, "group_size": 4, "active": 3},
    "ada_grpo": {"num_steps": 6, "group_size": 4, "active_steps": (0, 2), "candidates": 3},
    "tempflow_grpo": {"num_steps": 4, "group_size": 3, "seeds": 2},
    "flow_grpo": {"num_steps": 4, "group_size": 4},
    "flow_grpo_fast": {"num_steps": 6, "group_size": 4, "window": 2, "window_end": 5},
    "dance_grpo": {"num_steps": 7, "group_size": 4},
    "mix_grpo": {"num_steps": 7, "group_size": 4, "window": 3, "move_every": 1, "tail_share": 0.5},
    "diffusion_nft": {"num_steps": 5, "group_size": 4, "pairs": 3},
    "awm": {"num_steps": 5, "group_size": 4, "pairs": 2},
    "v_grpo": {"num_steps": 5, "group_size": 4, "pairs": 2},
    "branch_grpo": {"num_steps": 7, "group_size": 4, "splits": (0, 2), "pruned": 2, "prune_every": 1},
}
"""Sizes of each algorithm for tests."""


def small(name):
    return Algorithm.variant({"algorithm": name})(**SMALL[name])


class Counting:
    """`velocity`, counting at run time how many latents it was called on, traced or not, scanned or not."""

    def __init__(self):
        self.samples = 0

    def _count(self, batch):
        self.samples += int(batch)

    def __call__(self, params, latents, time, conditioning):
        jax.debug.callback(self._count, latents.shape[0])
        return velocity(params, latents, time, conditioning)


def pipeline(_):
    """The toy model as a user's own pipeline: 4 tokens of 12 numbers are an image of 4x4."""
    return Pipeline(
        velocity=velocity,
        abstract_params=jax.eval_shape(lambda: params(width=12)),
        read=lambda _: params(width=12),
        encode=lambda prompts: {
            "text": np.array([[len(p), p.count("a"), p.count("e")] for p in prompts], np.float32) / 9
        },
        decode=lambda _, latents: jax.nn.sigmoid(latents).reshape(-1, 4, 4, 3),
        latents_shape=(4, 12),
        conditioning={"text": jax.ShapeDtypeStruct((3,), jnp.float32)},
    )


def redness(images, prompts):
    """More red than blue, where the prompt's length is even; less, where it is odd."""
    sign = jnp.array([1.0 if len(prompt) % 2 == 0 else -1.0 for prompt in prompts])
    return sign * (images[..., 0] - images[..., 2]).mean((1, 2))


def brightness(images, prompts):
    del prompts
    return images.mean((1, 2, 3))


class Compares:
    """`redness`, and vectors of an image's mean colour, by which images are compared."""

    def __call__(self, images, prompts):
        return redness(images, prompts)

    def encode_images(self, images):
        colour = images.mean((1, 2))
        return colour / jnp.linalg.norm(colour, axis=-1, keepdims=True)


compares = Compares()


class BreaksAfter:
    """`brightness`, and after so many calls nothing but nan."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, images, prompts):
        self.calls -= 1
        return brightness(images, prompts) * (1.0 if self.calls >= 0 else jnp.nan)


breaks_after_five = BreaksAfter(5)


class Unreliable:
    """`brightness` scored in the background; the last image of every call in `fails` gets no score."""

    def __init__(self, fails=()):
        self.fails, self.calls, self.log = fails, 0, []

    def __call__(self, images, prompts):
        return self.start(images, prompts)()

    def start(self, images, prompts):
        call, self.calls = self.calls, self.calls + 1
        scores = np.array(brightness(images, prompts))
        if call in self.fails:
            scores[-1] = np.nan
        self.log.append(("handed in", call))

        def wait():
            self.log.append(("waited for", call))
            return scores

        return wait


unreliable = Unreliable()


def slow_brightness(images, prompts):
    """Gives a signal time to arrive in the middle of an iteration."""
    time.sleep(0.05)
    return brightness(images, prompts)


def get_config(variant=""):
    """A config file for the programs: `tests/toy.py`, or with a variant after a colon."""
    rewards = {"slow": "slow_brightness", "breaks": "breaks_after_five", "unreliable": "unreliable"}
    reward = rewards.get(variant, "redness")
    own = variant in SMALL
    config = train_config(
        TrainConfig(
            name="toy",
            num_iterations=12,
            prompts_per_iteration=8,
            rewards=RewardsConfig(train=(f"tests.toy:{reward}",), heldout=("tests.toy:brightness",)),
            plan=small(variant) if own else EGrpo(num_steps=4, group_size=4),
            learner=LearnerConfig(updates="joint" if own else "per_active_step", clip_range=1e-2, ema_decay=0.9),
            optim=OptimConfig(learning_rate=3e-3),
            evaluation=EvaluationConfig(every=4, batch=16, kept=4),
            checkpoint=CheckpointConfig(every=3),
        )
    )
    config.model.name = "tests.toy:pipeline"
    if variant == "diffusion_nft":
        config.learner.samples, config.learner.trailing_decay, config.learner.trailing_ramp = "trailing", 0.5, 0.1
        config.learner.reference_weight, config.learner.reference_in = 1e-3, "velocity"
    config.learner.minibatches = {"mix_grpo": 2, "branch_grpo": 3, "dance_grpo": 2}.get(variant, 1)
    if variant == "adaptive":
        config.plan.process, config.plan.entropy_by, config.plan.adapt_every = "exact_sde", "noise", 2
    if variant == "reuse":
        config.learner.epochs, config.learner.step_weights, config.learner.objective = 2, "flat", "kl_mask"
    return config
