"""Published CLIPs, each read into a model with its parameters on a mesh, and what it does to images and texts first."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.clip import Clip, ClipConfig
from egrpo_jax.parallel.rules import with_shardings
from egrpo_jax.rewards.batched import SCORER_RULES
from egrpo_jax.rewards.preprocess import CLIP_MEAN, CLIP_STD, Preprocess
from egrpo_jax.text.special_tokens import SPECIAL_TOKEN_FILES
from egrpo_jax.text.tokenizers import Tokenize, check_clip_ids, load_clip_tokenizer, load_open_clip_tokenizer
from egrpo_jax.weights.configs import NUMBER, POSITIVE, Key, Published, list_of, one_of, read_config, read_object
from egrpo_jax.weights.files import TensorFiles, open_tensors
from egrpo_jax.weights.hub import resolve
from egrpo_jax.weights.layout import Layout, Params
from egrpo_jax.weights.load import load_params
from egrpo_jax.weights.pickles import archive_root, open_pickle
from egrpo_jax.weights.published import clip, open_clip

TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json")
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TRANSFORMERS_WEIGHTS = ("model.safetensors", "pytorch_model.bin")

HPS_WEIGHTS = {
    version: tuple(f"HPS_{name}_compressed.{suffix}" for suffix in ("pt", "safetensors"))
    for version, name in (("2.0", "v2"), ("2.1", "v2.1"))
}
_HPS_BYTES = {1_972_484_501: "2.0", 1_972_490_005: "2.1"}

_PREPROCESS = {
    "mean": Key(list_of(NUMBER, 3), CLIP_MEAN),
    "std": Key(list_of(POSITIVE, 3), CLIP_STD),
    "interpolation": Key(one_of("bicubic"), "bicubic"),
    "resize_mode": Key(one_of("shortest", "squash"), "shortest"),
    "mode": Key(one_of("RGB"), "RGB"),
}


class LoadedClip(NamedTuple):
    """A model with its parameters, and what it is given: pixels of images and tokens of texts."""

    model: Clip
    params: Params
    preprocess: Preprocess
    tokenize: Tokenize


def load_clip(path: str, dtype: str, mesh: Mesh) -> LoadedClip:
    """The model in a folder as open_clip publishes it, or else transformers, or the one of that name on the Hub.

    Raises:
      UserError: a file is missing, wrong, or of another kind of model.
    """
    folder = resolve(path, [open_clip.FILE, "config.json", *TOKENIZER])
    if not (folder / open_clip.FILE).is_file():
        return load_transformers_clip(path, dtype, mesh)
    published = read_object(folder / open_clip.FILE)
    config = open_clip.config_from_open_clip(published.section("model_cfg"))
    preprocess = _preprocess_from_open_clip(published.section("preprocess_cfg"), config.vision.image_size)
    files = open_weights(find_file(path, OPEN_CLIP_WEIGHTS))
    return _load(files, config, open_clip.open_clip_layout, dtype, mesh, preprocess, load_open_clip_tokenizer(folder))


def load_transformers_clip(path: str, dtype: str, mesh: Mesh) -> LoadedClip:
    """The `CLIPModel` in a folder, or the one of that name on the Hub; raises as `load_clip`."""
    folder = resolve(path, ["config.json", *TOKENIZER, *SPECIAL_TOKEN_FILES])
    published = read_config(folder, "CLIPModel")
    config = clip.config_from_transformers(published)
    preprocess = Preprocess(config.vision.image_size, odd_crop="floor")
    files, tokenize = open_weights(find_file(path, TRANSFORMERS_WEIGHTS)), load_clip_tokenizer(folder)
    check_clip_ids(published.section("text_config"), config.text, tokenize)
    return _load(files, config, clip.clip_layout, dtype, mesh, preprocess, tokenize)


def load_hps(
    path: str, tokenizer: str, version: str, dtype: str, mesh: Mesh, config: ClipConfig
) -> tuple[LoadedClip, str | None]:
    """HPSv2 of these sizes from its file, its folder or the Hub, and which version the file is of, as `hps_version`.

    Raises:
      UserError: a file is missing, wrong, or of another model.
    """
    file = find_file(path, HPS_WEIGHTS[version])
    preprocess = Preprocess(config.vision.image_size, arithmetic="torch")
    tokenize = load_open_clip_tokenizer(resolve(tokenizer, TOKENIZER))
    files = open_weights(file, key="state_dict")
    loaded = _load(files, config, open_clip.open_clip_layout, dtype, mesh, preprocess, tokenize)
    return loaded, hps_version(file)


def hps_version(file: Path) -> str | None:
    """The version of HPSv2 that a file is of, "2.0" or "2.1": their tensors have the same names. None: it does not say.

    By the sizes of the published files; else by the name that a checkpoint keeps of the file it was saved to; else by
    the file's own.
    """
    if file.stat().st_size in _HPS_BYTES:
        return _HPS_BYTES[file.stat().st_size]
    roots = [archive_root(file)] if file.suffix != ".safetensors" else []
    for name in (*roots, file.stem):
        found = re.search(r"HPS_?v2(\.[01])?", name, re.IGNORECASE)
        if found:
            return f"2{found[1] or '.0'}"
    return None


def find_file(path: str, names: Sequence[str]) -> Path:
    """The file `path`, or the first of `names` in the folder `path`; only the one needed is downloaded from the Hub.

    Raises:
      UserError: none of them is there.
    """
    for name in names:
        found = resolve(path, [name])
        if found.is_file():
            return found
        if (found / name).is_file():
            return found / name
    raise UserError(f"{path} has none of {', '.join(names)}; give the folder as published, or one of these files")


def open_weights(file: Path, key: str | None = None) -> TensorFiles:
    """The tensors of a safetensors file, or of a checkpoint of PyTorch, there of the state dict under `key`."""
    return open_tensors(file) if file.suffix == ".safetensors" else open_pickle(file, key)


def _load(
    files: TensorFiles,
    config: ClipConfig,
    layout: Callable[[ClipConfig], Layout],
    dtype: str,
    mesh: Mesh,
    preprocess: Preprocess,
    tokenize: Tokenize,
) -> LoadedClip:
    model = Clip(config, jnp.dtype(dtype), jnp.dtype(dtype))
    params = load_params(files, layout(config), with_shardings(mesh, SCORER_RULES, clip_shapes(model)), clip.IGNORED)
    return LoadedClip(model, params, preprocess, tokenize)


def clip_shapes(model: Clip) -> Params:
    """The parameter tree as shapes."""
    size = model.config.vision.image_size

    def init() -> Any:
        return model.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), jnp.int32))

    return jax.eval_shape(init)["params"]


def _preprocess_from_open_clip(published: Published, size: int) -> Preprocess:
    """The preprocessing that the `preprocess_cfg` of an open_clip_config.json asks for; null is the default."""
    said = {key: value for key, value in published.items() if value is not None}
    asked = Published(said, published.file, published.prefix).checked(_PREPROCESS)
    fit: Literal["crop", "squash"] = "crop" if asked["resize_mode"] == "shortest" else "squash"
    return Preprocess(size, fit=fit, mean=tuple(asked["mean"]), std=tuple(asked["std"]))
