"""Models side by side: sampled with the same noise and scored, a batch of prompts at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.images import to_uint8
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.evaluation.statistics import Comparison, compare, diversity
from egrpo_jax.figures.grids import before_after, shrink, stack
from egrpo_jax.rewards import CheckedReward, Pending, Scores

Features = Callable[[Any], Any]
"""Images `[B, H, W, 3]` in [0, 1] to vectors of length 1, `[B, D]`."""
Columns = dict[str, Scores]
"""Scores `[P, S]` of S images of each of P prompts, by the reward's name or another measure's."""
SHOWN = 8
"""Most gains, and most losses, that are shown."""
_SHOWN_SIDE = 384


@dataclasses.dataclass(frozen=True)
class Judging:
    """A way to judge images.

    Attributes:
      rewards: by name.
      judge: the one of them whose largest gains and losses are shown.
      samples: images of each prompt.
      features: what the distance between the images of a prompt is measured by, if it is.
      diversity: the column that has it.
    """

    rewards: Mapping[str, CheckedReward]
    judge: str
    samples: int = 1
    features: Features | None = None
    diversity: str = "diversity"


class Pair(NamedTuple):
    """The first image of a prompt by either model, uint8 `[H, W, 3]`, and what the judge gives them."""

    prompt: str
    scores: tuple[float, float]
    images: tuple[np.ndarray, np.ndarray]


class Results(NamedTuple):
    """The scores of each model, the extremes of the second, and the images' size (H, W)."""

    scores: list[Columns]
    pairs: list[Pair]
    resolution: tuple[int, int]


def features_of(name: str, reward: CheckedReward) -> Features:
    """The image features of the reward `name`. Raises UserError if it has none."""
    features = reward.encode_images
    if features is None:
        raise UserError(
            f"--diversity: the reward {name!r} has no image features; name one that compares images and texts by "
            "vectors, such as emoji_judge or clip_score"
        )
    return features


def sample_and_score(
    sampler: Sampler, models: Sequence[Any], prompts: Sequence[str], seed: int, batch: int, judging: Judging
) -> Results:
    """Samples and scores `prompts`, `batch` at once, by each of `models`: one parameter tree, or two to compare.

    Image s of a prompt has the noise of its index and of `seed` + s: that which `sample` draws by that seed. The images
    of one batch at most are kept, and those of the pairs.

    Raises:
      UserError: no image of a batch is finite, or a reward cannot score them.
    """
    parts: list[list[Columns]] = [[] for _ in models]
    pairs: list[Pair] = []
    with tqdm(total=len(prompts) * judging.samples * len(models), desc="evaluate", unit="image") as bar:
        for first in range(0, len(prompts), batch):
            part = prompts[first : first + batch]
            handed_in = [_sample(sampler, params, part, first, seed, judging, bar) for params in models]
            scores = [_scores(judging, batch_of_one) for batch_of_one in handed_in]
            for of_model, new in zip(parts, scores, strict=True):
                of_model.append(new)
            images = [batch_of_one.images for batch_of_one in handed_in]
            if len(models) == 2:
                pairs = extremes(pairs + _pairs(part, [new[judging.judge] for new in scores], images))
    joined = [{name: Scores.join([part[name] for part in of_model]) for name in of_model[0]} for of_model in parts]
    return Results(joined, pairs, images[0].shape[1:3])


class _Batch(NamedTuple):
    """A batch of prompts by one model: scores to be waited for and features by sample, and the first images."""

    pending: list[dict[str, Pending[Scores]]]
    features: list[np.ndarray]
    images: np.ndarray


def _sample(
    sampler: Sampler, params: Any, prompts: Sequence[str], first: int, seed: int, judging: Judging, bar: tqdm
) -> _Batch:
    """Samples, and hands the images in for scoring, which goes on meanwhile if it is done on another machine."""
    batch = _Batch([], [], np.empty(0))
    for sample in range(judging.samples):
        batches = sampler(params, prompts, jax.random.key(seed + sample), first)
        images = np.concatenate([part for _, part in batches])
        batch.pending.append({name: reward.start(images, prompts) for name, reward in judging.rewards.items()})
        if judging.features is not None:
            batch.features.append(np.asarray(judging.features(images)))
        if not sample:
            batch = batch._replace(images=images)
        bar.update(len(prompts))
    return batch


def _scores(judging: Judging, batch: _Batch) -> Columns:
    columns = {}
    for name in judging.rewards:
        samples = [pending[name]() for pending in batch.pending]
        columns[name] = Scores(*(np.stack(parts, axis=1) for parts in zip(*samples, strict=True)))
    if judging.features is not None:
        distances = diversity(np.stack(batch.features, axis=1))
        columns[judging.diversity] = Scores.of(np.repeat(distances[:, None], judging.samples, axis=1))
    return columns


def _pairs(prompts: Sequence[str], scores: Sequence[Scores], images: Sequence[np.ndarray]) -> list[Pair]:
    """The pairs of a batch that have both scores, and may be among the extremes of all."""
    indices = np.flatnonzero(np.all([of_model.came[:, 0] for of_model in scores], axis=0)).tolist()
    base, tuned = (of_model.values[:, 0].tolist() for of_model in scores)
    # Sorted before anything is copied: the images of all would be much.
    bare = [Pair(prompts[i], (base[i], tuned[i]), (images[0][i], images[1][i])) for i in indices]
    small = lambda image: shrink(to_uint8(image), _SHOWN_SIDE)
    return [pair._replace(images=(small(pair.images[0]), small(pair.images[1]))) for pair in extremes(bare)]


def compare_all(scores: Sequence[Columns], judging: Judging, train: Sequence[str]) -> list[Comparison]:
    """A comparison for each column of one model's `scores`, or two models'; `train`: the training rewards."""
    roles = {name: "train" if name in train else "held out" for name in judging.rewards}
    tuned = scores[1] if len(scores) == 2 else {}
    return [
        compare(name, roles.get(name, "within a prompt"), base, tuned.get(name)) for name, base in scores[0].items()
    ]


def score_lines(prompts: Sequence[str], scores: Sequence[Columns]) -> str:
    """JSONL: a line for each prompt and sample, null for a score that did not come."""
    samples = next(iter(scores[0].values())).came.shape[1]
    lines = []
    for index, prompt in enumerate(prompts):
        for sample in range(samples):
            line: dict[str, Any] = {"prompt": prompt, "sample": sample}
            for model, of_model in zip(("base", "tuned"), scores, strict=False):
                line[model] = {
                    name: float(column.values[index, sample]) if column.came[index, sample] else None
                    for name, column in of_model.items()
                }
            lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    return "".join(lines)


def gain(pair: Pair) -> float:
    """The judge's score of the second image minus that of the first."""
    return pair.scores[1] - pair.scores[0]


def extremes(pairs: Sequence[Pair]) -> list[Pair]:
    """The largest gains, at most `SHOWN`, from the largest on, and the largest losses, the largest last."""
    ordered = sorted(pairs, key=lambda pair: -gain(pair))
    gains = [pair for pair in ordered if gain(pair) > 0]
    losses = [pair for pair in ordered if gain(pair) < 0]
    return gains[:SHOWN] + losses[-SHOWN:]


def gains_and_losses(pairs: Sequence[Pair], judge: str) -> Image.Image | None:
    """The `pairs` of `Results`, base above tuned, with prompts and scores; None if nothing gained or lost."""
    sheets = []
    for word, chosen in (
        ("gains", [pair for pair in pairs if gain(pair) > 0]),
        ("losses", [pair for pair in reversed(pairs) if gain(pair) < 0]),
    ):
        if chosen:
            old, new = (np.stack([pair.images[side] for pair in chosen]) / 255 for side in (0, 1))
            captions = [f"{pair.scores[0]:.3f} to {pair.scores[1]:.3f}: {pair.prompt}" for pair in chosen]
            title = f"the {len(chosen)} largest {word} under {judge}, of the first image of each prompt"
            sheets.append(before_after(old, new, captions, title, ("base", "tuned")))
    return stack(sheets) if sheets else None
