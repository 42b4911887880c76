"""The text encoder, distilled from MiniLM's sentence vectors of names and composed phrases."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

import chex
import jax
import jax.numpy as jnp
import numpy as np

from egrpo_jax.common.ranges import Range, Seed, check
from egrpo_jax.data.emoji import make_catalogue, write_catalogue
from egrpo_jax.models.text_encoder import TextEncoder, TextEncoderConfig, TextFeatures
from egrpo_jax.pretraining.loop import Optim, count, fit, last, rounded
from egrpo_jax.pretraining.minilm import sentence_embeddings
from egrpo_jax.text.emoji import tokenize, train_tokenizer
from egrpo_jax.weights.assets import save_asset

LICENSE = (
    "Distilled from sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0) on phrases made of Unicode CLDR emoji names "
    "(Unicode License v3)."
)
COLOURS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "golden", "silver",
)  # fmt: skip
LOOKS = (
    "big", "small", "tiny", "large", "old", "new", "happy", "sad", "angry", "cute", "round", "striped", "spotted",
    "shiny", "dark", "bright",
)  # fmt: skip
ARTICLES = ("a", "an", "the", "one", "two", "a picture of a", "an emoji of a", "a drawing of a")
JOINS = ("with", "and", "in", "on", "under", "near", "without", "holding")


@dataclasses.dataclass(frozen=True)
class TextJob:
    """Distillation of the text encoder.

    Attributes:
      kind: what is trained.
      seed: of phrases, parameters and batches.
      phrases: composed phrases beside the names; half of every batch each.
      width: of the encoder; it has 6 heads.
      num_layers: of the encoder.
      optim: how it is trained.
    """

    kind: Literal["text"] = "text"
    seed: Seed = 0
    phrases: Annotated[int, Range(1, 10_000_000)] = 16_000
    width: Annotated[int, Range(6, 6_000, multiple_of=6)] = 192
    num_layers: Annotated[int, Range(1, 1000)] = 2
    optim: Optim = dataclasses.field(default_factory=lambda: Optim(steps=1500, batch_size=256))

    def __post_init__(self) -> None:
        check(self)


def compose(names: Sequence[str], number: int, seed: int) -> list[str]:
    """Phrases such as a user may type: single words of `names`, colour or look + name, name + name, with articles."""
    rng = np.random.default_rng(seed)
    words = sorted({word for name in names for word in name.split()} | {*COLOURS, *LOOKS})
    short = [name for name in names if len(name.split()) <= 2]

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    makers = (
        lambda: f"{pick(COLOURS)} {pick(short)}",
        lambda: f"{pick(COLOURS)} {pick(words)}",
        lambda: f"{pick(LOOKS)} {pick(short)}",
        lambda: f"{pick(LOOKS)} {pick(COLOURS)} {pick(short)}",
        lambda: f"{pick(ARTICLES)} {pick(short)}",
        lambda: f"{pick(ARTICLES)} {pick(COLOURS)} {pick(short)}",
        lambda: f"{pick(short)} {pick(JOINS)} {pick(COLOURS)} {pick(words)}",
        lambda: f"{pick(short)} {pick(JOINS)} {pick(short)}",
        lambda: f"{pick(words)} {pick(words)}",
    )
    return words + [makers[rng.integers(len(makers))]() for _ in range(number)]


def distillation_loss(student: chex.Array, teacher: chex.Array) -> chex.Array:
    """One minus the cosine of unit vectors `[B, D]`, plus the squared error of the similarities within the batch."""
    similarity_error = jnp.square(student @ student.T - teacher @ teacher.T)
    return 1 - (student * teacher).sum(-1).mean() + similarity_error.mean()


def train(job: TextJob, output: str | os.PathLike[str]) -> dict[str, float]:
    """Makes the names, the tokenizer and the text encoder, all in the folder of `output`.

    Returns:
      The mean cosine to the teacher on names and on phrases not trained on, and R@1 of names among the teacher's.
    """
    emojis = make_catalogue()
    names = [emoji.name for emoji in emojis]
    write_catalogue(emojis, Path(output).with_name("emoji_names.json"))
    phrases = compose(names, job.phrases, job.seed)
    texts = names + phrases
    tokenizer = train_tokenizer(phrases)
    tokenizer.save(str(Path(output).with_name("tokenizer.json")))
    ids, targets = jnp.asarray(tokenize(texts, tokenizer)), jnp.asarray(sentence_embeddings(texts))

    config = TextEncoderConfig(tokenizer.get_vocab_size(), width=job.width, num_layers=job.num_layers)
    model = TextEncoder(config)
    half = job.optim.batch_size // 2
    seen = len(texts) - max(1, job.phrases // 32)

    def pooled(params: chex.ArrayTree, rows: chex.Array) -> chex.Array:
        return cast(TextFeatures, model.apply({"params": params}, rows)).pooled

    def loss_fn(params: chex.ArrayTree, data: tuple[chex.Array, chex.Array], key: chex.PRNGKey) -> chex.Array:
        name_key, phrase_key = jax.random.split(key)
        chosen_names = jax.random.randint(name_key, (half,), 0, len(names))
        chosen_phrases = jax.random.randint(phrase_key, (half,), len(names), seen)
        chosen = jnp.concatenate([chosen_names, chosen_phrases])
        return distillation_loss(pooled(params, data[0][chosen]), data[1][chosen])

    init_key, fit_key = jax.random.split(jax.random.key(job.seed))
    params = model.init(init_key, ids[:1])["params"]
    params = rounded(last(fit(loss_fn, params, (ids, targets), job.optim, fit_key)))
    save_asset(output, params, {"config": dataclasses.asdict(config), "license": LICENSE})
    student = pooled(params, ids)
    cosines = (student * targets).sum(-1)
    nearest = (student[: len(names)] @ targets[: len(names)].T).argmax(1)
    return {
        "parameters": count(params),
        "cosine_names": float(cosines[: len(names)].mean()),
        "cosine_unseen_phrases": float(cosines[seen:].mean()),
        "recall_1_names": float((nearest == jnp.arange(len(names))).mean()),
    }
