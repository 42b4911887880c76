"""A flow model with all that turns prompts into images, apart from its parameters: what every program runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import chex
import jax
from jax.sharding import Mesh

from egrpo_jax.common.errors import UserError
from egrpo_jax.common.trees import partition, path_name
from egrpo_jax.flow.grid import Times
from egrpo_jax.flow.solver import VelocityFn
from egrpo_jax.parallel import hosts
from egrpo_jax.parallel.rules import Rules, with_shardings


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """Prompts to images: functions, shapes and rules. It holds no array, so that all can be compiled before `load`.

    Attributes:
      velocity: `(params, latents[B, N, D], time[B], conditioning) -> velocity[B, N, D]`.
      abstract_params: of velocity and decoder, a dict of `jax.ShapeDtypeStruct`, nested at will, such as
        `jax.eval_shape(init)`.
      read: gives the parameters. It takes `abstract_params`, each leaf with its sharding, without the top-level entries
        that are not needed, and returns a tree with these leaves: arrays of NumPy or JAX, new ones at each call. Leaves
        that it has more are left out. Large ones are best read straight to where they belong.
      encode: prompts to the conditioning, a pytree with leading axis B; called under the mesh that is set, by all
        processes of a run alike.
      decode: `(params, latents[B, N, D])`, the latents at t = 0, to images `[B, H, W, 3]` in [0, 1]; traceable.
      latents_shape: (N, D).
      rules: how the parameters are sharded; by default they are replicated. Inside `velocity` and `decode` those that
        are split over `fsdp` come in boxes, which Flax's layers open; a function of one's own calls
        `flax.linen.meta.unbox` where it reads them.
      dtype: what split parameters are gathered in, since the model computes in it; None: as they are stored.
      trainable: regular expression, found in the paths (joined with '/') of the parameters that training changes.
      conditioning: what `encode` gives for one prompt, as `jax.ShapeDtypeStruct` without the leading axis; only `plan`
        needs it.
      encoder_params: parameters, as `abstract_params`, that stay in the devices' memory once `encode` has been called;
        laid out by `rules` as well.
      passes: of the model in a velocity; 2 where it is guided away from a negative prompt.
      forward_flops: floating-point operations of one sample's velocity, all its passes, where known.
      decode_flops: those of decoding it, where known.
      training_flops: those of its forward and backward pass, with what is computed again, where known.
      sampling_times: the time grid on which the published model samples in so many steps, where it has one of its own.
      known_prompts: all that `encode` takes; None if it takes any.
      about: what else its images depend on, as JSON values, for the record of an evaluation.
    """

    velocity: VelocityFn
    abstract_params: dict[str, Any]
    read: Callable[[dict[str, Any]], Any]
    encode: Callable[[Sequence[str]], Any]
    decode: Callable[[Any, chex.Array], chex.Array]
    latents_shape: tuple[int, int]
    rules: Rules = ()
    dtype: Any = None
    trainable: str = ""
    conditioning: Any = None
    encoder_params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    passes: int = 1
    forward_flops: float | None = None
    decode_flops: float | None = None
    training_flops: float | None = None
    sampling_times: Callable[[int], Times] | None = None
    known_prompts: Container[str] | None = None
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not jax.tree.leaves(partition(self.abstract_params, self.trainable)[0]):
            raise UserError(f"trainable {self.trainable!r} is found in no parameter's path, so nothing can be trained")

    def abstract(self, mesh: Mesh) -> dict[str, Any]:
        """`abstract_params` with the sharding of every leaf on `mesh`: for compiling, and for restoring a run."""
        return with_shardings(mesh, self.rules, self.abstract_params)

    def load(self, mesh: Mesh) -> dict[str, Any]:
        """All parameters, on `mesh` as `rules` say.

        Raises:
          UserError: a file is missing, damaged, or of another model.
        """
        return self._load(mesh, self.abstract_params)

    def load_frozen(self, mesh: Mesh) -> dict[str, Any]:
        """The parameters that training does not change, None in place of the others.

        That is the second part of `partition(params, trainable)`. Top-level entries that are trained whole are not
        read: a run's are in its checkpoint.

        Raises:
          UserError: as `load`.
        """
        return self._load(mesh, partition(self.abstract_params, self.trainable)[1])

    def require(self, prompts: Sequence[str]) -> None:
        """Raises UserError if `encode` does not take one of `prompts`."""
        missing = [] if self.known_prompts is None else [p for p in prompts if p not in self.known_prompts]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(prompts)} prompts have no stored embedding, the first is {missing[0]!r}; "
                "make them with python -m egrpo_jax.encode"
            )

    def _load(self, mesh: Mesh, wanted: dict[str, Any]) -> dict[str, Any]:
        parts = {name: part for name, part in self.abstract(mesh).items() if jax.tree.leaves(wanted[name])}
        read = self.read(parts) if parts else {}
        found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(read)}
        del read  # what is laid out, or left out, is not held here
        return jax.tree_util.tree_map_with_path(
            lambda path, struct: _laid_out(path_name(path), struct, found), with_shardings(mesh, self.rules, wanted)
        )


def _laid_out(path: str, wanted: jax.ShapeDtypeStruct, found: dict[str, Any]) -> jax.Array:
    """Takes the array at `path` out of `found` and to where it belongs; one that lies there already is not copied."""
    array = found.pop(path, None)
    is_there = array is not None and jax.numpy.shape(array) == wanted.shape
    if not is_there or jax.numpy.result_type(array) != wanted.dtype:
        what = "nothing" if array is None else f"{jax.numpy.result_type(array)}{list(jax.numpy.shape(array))}"
        raise UserError(
            f"the pipeline's read gives {what} for the parameter {path}, its abstract_params say "
            f"{wanted.dtype}{list(wanted.shape)}"
        )
    return hosts.on_all(array, wanted.sharding)


class PromptEncoder(Protocol):
    """Text encoders whose results are worth keeping; loaded at the first use, on the mesh that is set."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that determine the embeddings, as JSON values."""

    @property
    def always(self) -> Sequence[str]:
        """Prompts whose embeddings the model needs beside those that are asked for."""

    def __call__(self, prompts: Sequence[str], /) -> Any:
        """The conditioning of B prompts: a NamedTuple of arrays with leading axis B."""


@dataclasses.dataclass(frozen=True)
class Export:
    """An order to `convert`.

    Attributes:
      out: the file or folder, a new one.
      dtype: floating-point type of the weights in it.
      copy: whether parts of the base that stay as they are become copies, not links.
      of_run: whether the weights are those of a training run, not the base's own.
    """

    out: Path
    dtype: str
    copy: bool
    of_run: bool


Writer = Callable[[Any], None]
"""Writes a pipeline's parameters."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A place that models come from, by the name that the config gives it in `model.name`.

    Its functions take `model.path` and the options in the section of its name, None where it has none; they raise
    `ConfigError` with keys of that section, and read no weights.

    Attributes:
      name: in the config.
      pipeline: describes the model.
      sketch: describes it from its sizes alone, the published ones where `model.path` is not on this machine: the
        `read` and `encode` of what it returns raise UserError. None: `pipeline` needs no files.
      path: says of a required `model.path` what it must be; None where it may be left out.
      encoder: text encoders by themselves, where embeddings can be stored.
      exporters: by the form in which weights are given back; each checks what it can of an `Export` before it returns
        what writes it.
      exact: options with which the base is read as it was published, to be given back, by their names in the section.
      lighter: from options others, by their names, with which a run takes less memory: one set after another.
    """

    name: str
    pipeline: Callable[[Any, Any], Pipeline]
    sketch: Callable[[Any, Any], Pipeline] | None = None
    path: str | None = None
    encoder: Callable[[Any, Any], PromptEncoder] | None = None
    exporters: Mapping[str, Callable[[Any, Any, Export], Writer]] = dataclasses.field(default_factory=dict)
    exact: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lighter: Callable[[Any], Iterable[Mapping[str, Any]]] = lambda _: ()
