"""Sampling fixed prompts with fixed noise, scoring the images, and noticing when rewards part ways."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.errors import UserError
from egrpo_jax.common.images import to_display
from egrpo_jax.evaluation.statistics import paired_interval
from egrpo_jax.rewards import Reward, with_nan


class Evaluation(NamedTuple):
    """One evaluation: its iteration, each reward's scores `[P]`, and the images it keeps, uint8 `[S, H, W, 3]`."""

    iteration: int
    scores: dict[str, np.ndarray]
    images: np.ndarray


def score(rewards: Mapping[str, Reward], images: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Every reward's scores `[P]` of the images."""
    return {name: np.asarray(with_nan(reward(images, prompts)), np.float64) for name, reward in rewards.items()}


def save_evaluation(workdir: Path, evaluation: Evaluation) -> None:
    """Writes `eval/<iteration>.npz`, from which a resumed run goes on comparing."""
    buffer = io.BytesIO()
    arrays = {f"score:{name}": values for name, values in evaluation.scores.items()}
    np.savez_compressed(buffer, images=evaluation.images, **arrays)  # type: ignore[arg-type]
    atomic_write(workdir / "eval" / f"{evaluation.iteration:06d}.npz", buffer.getvalue())


def load_evaluations(workdir: Path, last: int, rewards: Iterable[str], num_prompts: int) -> list[Evaluation]:
    """The evaluations of iterations up to `last`, in order; later ones belong to a future that did not happen.

    Raises:
      UserError: there are none, one is damaged, or one is of other rewards or another number of prompts.
    """
    evaluations = []
    for path in sorted((workdir / "eval").glob("[0-9]*.npz")):
        if int(path.stem) > last:
            continue
        try:
            with np.load(path) as arrays:
                scores = {key.removeprefix("score:"): arrays[key] for key in arrays.files if key != "images"}
                evaluations.append(Evaluation(int(path.stem), scores, arrays["images"]))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise UserError(f"cannot read {path}: {error}; restore it or start over in another workdir") from error
        if {name: len(values) for name, values in scores.items()} != dict.fromkeys(rewards, num_prompts):
            raise UserError(f"{path} is of other rewards or prompts; what they change needs a new workdir")
    if not evaluations:
        raise UserError(f"found no evaluation in {workdir / 'eval'}; restore it or start over in another workdir")
    return evaluations


def even_places(num_prompts: int, most: int) -> np.ndarray:
    """Places of at most `most` prompts, evenly spread, so that every kind of prompt is seen."""
    return np.unique(np.linspace(0, num_prompts - 1, min(most, num_prompts)).round().astype(int))


def make_evaluation(
    iteration: int, rewards: Mapping[str, Reward], images: np.ndarray, prompts: Sequence[str], kept: int
) -> Evaluation:
    """Scores `images` and keeps at most `kept` of them, evenly spread."""
    places = even_places(len(prompts), kept)
    return Evaluation(iteration, score(rewards, images, prompts), to_display(images[places]))


def mean_score(scores: np.ndarray) -> float:
    """The mean of the scores that came; nan if none did."""
    came = scores[~np.isnan(scores)]
    return float(came.mean()) if came.size else math.nan


def evaluation_metrics(first: Evaluation, now: Evaluation) -> dict[str, float]:
    """Means, and the mean paired changes since `first` with the half-width of their 95 % intervals."""
    metrics = {}
    for name, scores in now.scores.items():
        change, half_width = paired_interval(first.scores[name], scores)
        metrics[f"eval/{name}/mean"] = mean_score(scores)
        metrics[f"eval/{name}/missing"] = float(np.isnan(scores).sum())
        metrics[f"eval/{name}/change"] = change
        metrics[f"eval/{name}/change_ci95"] = half_width
    return metrics


def parted_rewards(history: Sequence[Evaluation], trained: Iterable[str], heldout: Iterable[str]) -> list[str]:
    """Signs of reward hacking, a line each: held-out scores that have fallen from their best while a trained one rose.

    Both changes are taken since the evaluation at which the held-out score was best, over the same prompts and noise,
    and both must leave their 95 % intervals.
    """
    now, warnings = history[-1], []
    for judge in heldout:
        # An evaluation without any score is the best of none.
        best = max(history, key=lambda evaluation: np.nan_to_num(mean_score(evaluation.scores[judge]), nan=-np.inf))
        fall, fall_width = paired_interval(best.scores[judge], now.scores[judge])
        for name in trained:
            rise, rise_width = paired_interval(best.scores[name], now.scores[name])
            if fall < -fall_width and rise > rise_width:
                warnings.append(
                    f"reward hacking? since iteration {best.iteration} the trained {name} rose by {rise:.4f} while the "
                    f"held-out {judge} fell by {-fall:.4f}"
                )
    return warnings
