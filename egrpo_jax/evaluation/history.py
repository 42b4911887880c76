"""Evaluations of a run: fixed prompts, fixed noise, their record, and noticing when rewards part ways."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.errors import UserError, first_line
from egrpo_jax.common.images import to_display
from egrpo_jax.evaluation.sampler import Sampler
from egrpo_jax.evaluation.statistics import paired_change
from egrpo_jax.parallel import hosts
from egrpo_jax.rewards import CheckedReward, Pending, RewardError, Scores


class Evaluation(NamedTuple):
    """One evaluation: its iteration, each reward's scores `[P]`, and the images it keeps, uint8 `[S, H, W, 3]`."""

    iteration: int
    scores: dict[str, Scores]
    images: np.ndarray


def evaluate(
    iteration: int,
    sampler: Sampler,
    params: Any,
    prompts: Sequence[str],
    key: jax.Array,
    rewards: Mapping[str, CheckedReward],
    kept: int,
) -> Evaluation:
    """Samples and scores an image of each prompt, a batch at a time, and keeps at most `kept` of them, evenly spread.

    Raises:
      UserError: no image of a batch is finite, or a reward cannot score them.
    """
    indices, mesh = even_indices(len(prompts), kept), jax.sharding.get_mesh()
    places: list[np.ndarray] = []
    pending: list[dict[str, Pending[Scores]]] = []
    shown: list[np.ndarray] = []
    with tqdm(total=len(prompts), desc="evaluate", unit="image", leave=False, disable=None) as bar:
        for own, images in sampler.own(params, prompts, key):
            part = [prompts[place] for place in own]
            with hosts.agreed(RewardError), hosts.alone(mesh):
                pending.append({name: reward.start(images, part) for name, reward in rewards.items()})
            shown.append(to_display(images[np.isin(own, indices)]))
            places.append(own)
            bar.update(len(images))
    with hosts.agreed(RewardError):
        scores = {name: Scores.join([part[name]() for part in pending]) for name in rewards}
    own = np.concatenate(places)
    images = hosts.total_rows(np.concatenate(shown), np.flatnonzero(np.isin(indices, own)), len(indices))
    whole = hosts.total_rows(scores, own, len(prompts))
    return Evaluation(iteration, {name: whole[name] for name in rewards}, images)  # a pytree sorts its keys


def even_indices(num_prompts: int, most: int) -> np.ndarray:
    """Indices of at most `most` prompts, evenly spread, so that every kind of prompt is seen."""
    return np.unique(np.linspace(0, num_prompts - 1, min(most, num_prompts)).round().astype(int))


def save_evaluation(workdir: Path, evaluation: Evaluation, prompts: str) -> None:
    """Writes `eval/<iteration>.npz`, from which a resumed run goes on comparing; `prompts` is their hash."""
    buffer = io.BytesIO()
    values = {f"score:{name}": scores.values for name, scores in evaluation.scores.items()}
    came = {f"came:{name}": scores.came for name, scores in evaluation.scores.items()}
    np.savez_compressed(buffer, images=evaluation.images, prompts=np.array(prompts), **values, **came)  # type: ignore[arg-type]
    atomic_write(workdir / "eval" / f"{evaluation.iteration:06d}.npz", buffer.getvalue())


def load_evaluations(workdir: Path, last: int, rewards: Iterable[str], prompts: str) -> list[Evaluation]:
    """The evaluations of iterations up to `last`, in order; later ones belong to a future that did not happen.

    Raises:
      UserError: the first, of iteration 0, is missing, one is damaged, or one is of other rewards or of prompts with
        another hash.
    """
    paths = [path for path in sorted((workdir / "eval").glob("*.npz")) if re.fullmatch("[0-9]{6,}", path.stem)]
    evaluations = [_load(path, set(rewards), prompts) for path in paths if int(path.stem) <= last]
    if not evaluations or evaluations[0].iteration:
        raise UserError(
            f"found no {workdir / 'eval' / '000000.npz'}, the evaluation that all later ones are compared with; "
            "restore it or start over in another workdir"
        )
    return evaluations


def _load(path: Path, rewards: set[str], prompts: str) -> Evaluation:
    try:
        with np.load(path) as file:
            arrays = dict(file)
        names = {key.removeprefix("score:") for key in arrays if key.startswith("score:")}
        scores = {name: Scores(arrays[f"score:{name}"], arrays[f"came:{name}"].astype(bool)) for name in names}
        evaluation, found = Evaluation(int(path.stem), scores, arrays["images"]), str(arrays["prompts"])
        _check_arrays(evaluation)
    except Exception as error:  # NumPy, zipfile and zlib have one each for every way in which a file can be damaged
        raise UserError(
            f"cannot read {path}: {first_line(error)}; restore it or start over in another workdir"
        ) from error
    if names != rewards:
        raise UserError(f"{path} is of the rewards {sorted(names)}; what they change needs a new workdir")
    if found != prompts:
        raise UserError(f"{path} is of other prompts: the evaluation's have changed since, which needs a new workdir")
    return evaluation


def _check_arrays(evaluation: Evaluation) -> None:
    """Raises ValueError if the arrays of `evaluation` are not of one kind and number of prompts."""
    shapes = {array.shape for scores in evaluation.scores.values() for array in scores}
    kinds = {scores.values.dtype for scores in evaluation.scores.values()}
    if len(shapes) != 1 or kinds != {np.dtype(np.float32)} or evaluation.images.dtype != np.uint8:
        raise ValueError("its arrays do not belong together")


def evaluation_numbers(first: Evaluation, now: Evaluation) -> dict[str, float]:
    """Means, and the mean paired changes since `first` with the half-width of their 95 % intervals."""
    numbers = {}
    for name, scores in now.scores.items():
        change = paired_change(first.scores[name], scores)
        numbers[f"eval/{name}/mean"] = scores.mean()
        numbers[f"eval/{name}/missing"] = float((~scores.came).sum())
        numbers[f"eval/{name}/change"] = change.mean
        numbers[f"eval/{name}/change_ci95"] = change.half_width
    return numbers


def parted_rewards(history: Sequence[Evaluation], train: Iterable[str], heldout: Iterable[str]) -> list[str]:
    """Signs of reward hacking, a line each: a held-out reward has fallen from its best while a training reward rose.

    Both changes are taken since the evaluation at which the held-out score was best, over the same prompts and noise,
    and both must leave their 95 % intervals.
    """
    now, warnings = history[-1], []
    for judge in heldout:
        # An evaluation without any score is the best of none.
        best = max(history, key=lambda evaluation: np.nan_to_num(evaluation.scores[judge].mean(), nan=-np.inf))
        fall = paired_change(best.scores[judge], now.scores[judge])
        if not fall.high < 0:
            continue
        for name in train:
            rise = paired_change(best.scores[name], now.scores[name])
            if rise.low > 0:
                warnings.append(
                    f"reward hacking? since iteration {best.iteration} the training reward {name} rose by "
                    f"{rise.mean:.4f} while the held-out reward {judge} fell by {-fall.mean:.4f}"
                )
    return warnings
