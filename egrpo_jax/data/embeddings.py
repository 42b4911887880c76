"""Text embeddings of prompts on disk: made once, read at random.

A folder holds `settings.json` (what the embeddings were made by) and shards. A shard is an ArrayRecord file with one
record for each prompt, a safetensors blob of its arrays, and a `.jsonl` beside it with the prompts in the same order
and their SHA-256. A shard appears under its name when it is whole, so that an interrupted job goes on after the last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax.numpy as jnp
import numpy as np
import safetensors
from array_record.python.array_record_module import ArrayRecordWriter
from safetensors.numpy import save
from tqdm import tqdm

from egrpo_jax.common.atomic import atomic_write
from egrpo_jax.common.errors import UserError, first_line

Arrays = dict[str, np.ndarray]
"""The arrays of one prompt, or of B prompts with a leading axis B."""

_DTYPES = {"BF16": jnp.bfloat16, "F16": np.float16, "F32": np.float32, "I32": np.int32}


def prompt_hash(prompt: str) -> str:
    """The hash that tells prompts apart: SHA-256 of the UTF-8 text, in hex."""
    return hashlib.sha256(prompt.encode()).hexdigest()


class EmbeddingStore:
    """The embeddings in a folder, as a random-access source: `grain.MapDataset.source(store)` shuffles, batches and
    iterates with a state that can be saved. `len(store)` prompts; `store[i]` are the arrays of the prompt `i`.

    Attributes:
      settings: what they were made by.
      prompts: in the order of the records.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        """Reads the list of prompts; arrays are read as they are asked for.

        Raises:
          UserError: no embeddings are there, or they are damaged.
        """
        self._folder = Path(folder)
        self.settings = _read_settings(self._folder)
        shards = _shards(self._folder)
        if not shards:
            raise UserError(f"found no embeddings in {folder}; make them with python -m egrpo_jax.encode")
        self.prompts = [prompt for shard in shards for prompt in _shard_prompts(shard)]
        self._indices = {prompt_hash(prompt): index for index, prompt in enumerate(self.prompts)}
        self._records = grain.sources.ArrayRecordDataSource([str(shard) for shard in shards])

    def __len__(self) -> int:
        return len(self.prompts)

    def __contains__(self, prompt: object) -> bool:
        return isinstance(prompt, str) and prompt_hash(prompt) in self._indices

    def __getitem__(self, index: int) -> Arrays:
        try:
            tensors = safetensors.deserialize(self._records[index])
            return {
                name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
                for name, tensor in tensors
            }
        except (RuntimeError, OSError, KeyError, safetensors.SafetensorError) as error:
            raise UserError(
                f"the embedding of {self.prompts[index]!r} in {self._folder} is damaged ({first_line(error)}); "
                "make them anew"
            ) from None

    def lookup(self, prompts: Sequence[str]) -> Arrays:
        """The arrays of `prompts`, each with leading axis B. Raises KeyError for a prompt that is not there."""
        records = [self[self._indices[prompt_hash(prompt)]] for prompt in prompts]
        return {name: np.stack([record[name] for record in records]) for name in records[0]}


def write_embeddings(
    folder: str | os.PathLike[str],
    prompts: Iterable[str],
    encode: Callable[[list[str]], Mapping[str, np.ndarray]],
    settings: Mapping[str, Any],
    batch: int,
    shard_size: int,
) -> int:
    """Adds the embeddings of `prompts` to `folder`, each prompt once; what is there already is not made again.

    One process at a time may do so: `common.lock.owned`.

    Args:
      folder: made if it does not exist.
      prompts: in any number; repeated ones count once.
      encode: a list of `batch` prompts to arrays with that leading axis.
      settings: JSON values that determine the embeddings; those of a folder must not change.
      batch: prompts encoded at once; the last batch is filled up with its last prompt.
      shard_size: records in a shard.

    Returns:
      How many were made.

    Raises:
      UserError: the folder cannot be written, is damaged or was made with other settings.
    """
    folder = Path(folder)
    _claim(folder, settings)
    shards = _shards(folder)
    done = {prompt_hash(prompt) for shard in shards for prompt in _shard_prompts(shard)}
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt_hash(prompt) not in done]
    first = int(shards[-1].stem) + 1 if shards else 0
    with tqdm(total=len(new), desc="encode", unit="prompt") as bar:
        for number, start in enumerate(range(0, len(new), shard_size), first):
            part = new[start : start + shard_size]
            _write_shard(folder / f"{number:05d}.arrayrecord", part, _encoded(part, encode, batch, bar))
    return len(new)


def _encoded(
    prompts: list[str], encode: Callable[[list[str]], Mapping[str, np.ndarray]], batch: int, bar: tqdm
) -> Iterator[bytes]:
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        arrays = encode(part + part[-1:] * (batch - len(part)))
        for row in range(len(part)):
            yield save({name: np.asarray(array[row], order="C") for name, array in arrays.items()})
        bar.update(len(part))


def _write_shard(path: Path, prompts: list[str], records: Iterable[bytes]) -> None:
    unfinished = path.with_suffix(".tmp")
    try:
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
    except (RuntimeError, OSError) as error:
        raise UserError(f"cannot write {path}: {error}") from None
    lines = [json.dumps({"prompt": prompt, "sha256": prompt_hash(prompt)}) for prompt in prompts]
    atomic_write(path.with_suffix(".jsonl"), "\n".join(lines) + "\n")
    unfinished.rename(path)


def _shards(folder: Path) -> list[Path]:
    """The whole shards, in order.

    Raises:
      UserError: one was lost. An interrupted job leaves a list of prompts too, but the unfinished shard with it.
    """
    for index in sorted(folder.glob("[0-9]*.jsonl")):
        if not (index.with_suffix(".tmp").exists() or index.with_suffix(".arrayrecord").exists()):
            raise _damage(index, f"there is no {index.stem}.arrayrecord beside it")
    return sorted(folder.glob("[0-9]*.arrayrecord"))


def _shard_prompts(shard: Path) -> list[str]:
    """The prompts of a shard that has a record for each."""
    path = shard.with_suffix(".jsonl")
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        prompts = [line["prompt"] for line in lines]
        if [prompt_hash(prompt) for prompt in prompts] != [line["sha256"] for line in lines]:
            raise ValueError("a checksum differs")
    except OSError as error:
        raise _damage(path, str(error.strerror)) from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _damage(path, f"it is damaged ({first_line(error)})") from None
    try:
        records = len(grain.sources.ArrayRecordDataSource([str(shard)]))
    except (RuntimeError, ValueError, OSError) as error:
        raise _damage(shard, f"it is damaged ({first_line(error) or 'cut short'})") from None
    if records != len(prompts):
        raise _damage(shard, f"it has {records} embeddings for the {len(prompts)} prompts in {path.name}")
    return prompts


def _damage(path: Path, what: str) -> UserError:
    mend = f"delete {path.stem}.jsonl and {path.stem}.arrayrecord and encode again, which makes what is missing"
    return UserError(f"cannot read {path}: {what}; {mend}")


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / "settings.json"
    expected = "expected a folder of embeddings, made with python -m egrpo_jax.encode"
    try:
        settings = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {expected}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({first_line(error)}); {expected}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds a {type(settings).__name__}, no object; {expected}")
    return settings


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "settings.json"
    wanted = json.loads(json.dumps(dict(settings)))
    if not path.exists():
        atomic_write(path, json.dumps(wanted, indent=2, sort_keys=True) + "\n")
    elif (found := _read_settings(folder)) != wanted:
        raise UserError(f"{folder} holds embeddings made with {found}, now {wanted}; choose another folder")
