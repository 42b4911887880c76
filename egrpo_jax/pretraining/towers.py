"""The reward towers, trained to tell every emoji's image, corrupted, from all others by its name."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated, Literal

import chex
import jax
import jax.numpy as jnp
import optax

from egrpo_jax.common.ranges import Range, Seed, check
from egrpo_jax.data.emoji import catalogue, render
from egrpo_jax.models.towers import Tower, TowerConfig
from egrpo_jax.pretraining.corruption import CORRUPTIONS
from egrpo_jax.pretraining.loop import Optim, count, fit, last, rounded
from egrpo_jax.text.emoji_encoder import encode_prompts
from egrpo_jax.weights.assets import save_asset

LICENSE = (
    "Trained on images of OpenMoji (openmoji.org), the open-source emoji and icon project, CC BY-SA 4.0; "
    "these weights: CC BY-SA 4.0."
)


@dataclasses.dataclass(frozen=True)
class TowerJob:
    """One tower.

    Attributes:
      name: of the asset.
      trunk: convolutions or an MLP-mixer.
      width: of the trunk's first stage.
      corruption: of the images, which the tower is trained to withstand.
      optim: how it is trained.
      kind: what is trained.
      seed: of parameters and batches.
    """

    name: Literal["reward", "judge", "weak"]
    trunk: Literal["conv", "mixer"]
    width: Annotated[int, Range(1, 10_000)]
    corruption: Literal["generator", "augment", "weak", "cast"]
    optim: Optim
    kind: Literal["tower"] = "tower"
    seed: Seed = 0

    def __post_init__(self) -> None:
        check(self)


def train(job: TowerJob, output: str | os.PathLike[str]) -> dict[str, float]:
    """Trains a tower and writes it to `output`.

    Returns:
      R@1 among all names on clean images and under each kind of corruption, as the file gives the weights back.
    """
    emojis = catalogue()
    images = jnp.asarray(render(emojis), jnp.float32) / 255
    pooled = jnp.asarray(encode_prompts([emoji.name for emoji in emojis]).pooled)
    config = TowerConfig(job.trunk, job.width)
    model = Tower(config)
    corrupt = CORRUPTIONS[job.corruption]

    def loss_fn(params: chex.ArrayTree, data: tuple[chex.Array, chex.Array], key: chex.PRNGKey) -> chex.Array:
        choice_key, corruption_key = jax.random.split(key)
        chosen = jax.random.randint(choice_key, (job.optim.batch_size,), 0, len(data[0]))
        # Against all names, not those of the batch alone: they are few enough, and this is what R@1 asks for.
        logits = model.apply({"params": params}, corrupt(corruption_key, data[0][chosen]), data[1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, chosen).mean()

    init_key, fit_key, test_key = jax.random.split(jax.random.key(job.seed), 3)
    params = model.init(init_key, images[:1], pooled[:1])["params"]
    params = rounded(last(fit(loss_fn, params, (images, pooled), job.optim, fit_key)))
    save_asset(output, params, {"config": dataclasses.asdict(config), "license": LICENSE})

    logits_of = jax.jit(lambda batch: model.apply({"params": params}, batch, pooled))
    variants = {"clean": images} | {name: f(test_key, images) for name, f in CORRUPTIONS.items()}
    hits = {name: logits_of(batch).argmax(-1) == jnp.arange(len(images)) for name, batch in variants.items()}
    return {"parameters": count(params)} | {f"recall_1_{name}": float(hit.mean()) for name, hit in hits.items()}
