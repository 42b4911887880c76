"""From gradients to new parameters: all at once, or a layer at a time where the optimizer's state rests on the host.

Neither is applied where it would leave a nan or infinity: a finite gradient may have an infinite update, and a finite
update may overflow what a parameter is stored in. To choose between old and new parameters afterwards would need memory
for both, so the update is made twice: first for this one bit, then in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from egrpo_jax.common.offload import on_device, rests_on_host, where_it_was


class Applied(NamedTuple):
    """The parameters and the optimizer's state after an update.

    Attributes:
      sound: whether all was finite; if not, `params` and `opt_state` are those of before.
      update_norm: of the change, were it sound.
    """

    params: Any
    opt_state: Any
    sound: chex.Array
    update_norm: chex.Array


@jax.named_scope("optimizer")
def apply_gradient(
    optimizer: optax.GradientTransformationExtraArgs,
    loss: chex.Array,
    norm: chex.Array,
    grads: Any,
    opt_state: Any,
    params: Any,
) -> Applied:
    """One update of `params` by `grads`, of global norm `norm`; not applied where it, or `loss`, is not finite."""
    apply = _by_layers if rests_on_host(opt_state) else _at_once
    return apply(optimizer, loss, norm, grads, opt_state, params)


def _at_once(optimizer: Any, loss: chex.Array, norm: chex.Array, grads: Any, opt_state: Any, params: Any) -> Applied:
    sound = _all_finite((loss, *_new(optimizer, norm, grads, opt_state, params)[:2]))
    # Without the barrier XLA would keep what it has computed for this bit.
    grads, opt_state, params, sound = jax.lax.optimization_barrier((grads, opt_state, params, sound))
    *new, square = _new(optimizer, norm, grads, opt_state, params)
    params, opt_state = _where(sound, tuple(new), (params, opt_state))
    return Applied(params, opt_state, sound, jnp.sqrt(square))


def _by_layers(optimizer: Any, loss: chex.Array, norm: chex.Array, grads: Any, opt_state: Any, params: Any) -> Applied:
    """An update by loops in place: of what XLA could fetch at once, it would fetch as much as there is room for."""
    structure, sound = jax.tree.structure(params), jnp.isfinite(loss)
    for leaf in _leaves(grads, opt_state, params):
        sound &= _is_sound(optimizer, norm, *leaf)
    new = [_in_place(optimizer, norm, sound, *leaf) for leaf in _leaves(grads, opt_state, params)]
    own, states, squares = zip(*new, strict=True)
    joined = lambda old, *parts: jax.tree.unflatten(structure, parts) if _is_like(structure, old) else parts[-1]
    opt_state = jax.tree.map(joined, opt_state, *states, is_leaf=lambda part: _is_like(structure, part))
    return Applied(jax.tree.unflatten(structure, own), opt_state, sound, jnp.sqrt(sum(squares)))


def _leaves(grads: Any, opt_state: Any, params: Any) -> Iterator[tuple[chex.Array, Any, chex.Array]]:
    """Of each parameter its gradient, its own part of the optimizer's state, and itself."""
    structure = jax.tree.structure(params)
    is_like = lambda part: _is_like(structure, part)
    for index, (grad, param) in enumerate(zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True)):
        own = lambda part: jax.tree.leaves(part)[index] if is_like(part) else part  # noqa: B023  # used at once
        yield grad, jax.tree.map(own, opt_state, is_leaf=is_like), param


def _is_like(structure: Any, part: Any) -> bool:
    return bool(jax.tree.structure(part) == structure)


def _is_sound(optimizer: Any, norm: chex.Array, grad: chex.Array, state: Any, param: chex.Array) -> chex.Array:
    def check(layer: Any, sound: chex.Array) -> chex.Array:
        before = _layer(layer, (grad, state, param))
        return sound & _all_finite(_new(optimizer, norm, *on_device(before))[:2])

    return _loop(param, check, jnp.array(True))


def _in_place(
    optimizer: Any, norm: chex.Array, sound: chex.Array, grad: chex.Array, state: Any, param: chex.Array
) -> tuple[chex.Array, Any, chex.Array]:
    """The parameter, its state, and the square of the norm of its change."""

    def change(layer: Any, carry: tuple[chex.Array, Any, chex.Array]) -> tuple[chex.Array, Any, chex.Array]:
        param, now, square = carry
        # Every layer starts from the counts of before.
        current = jax.tree.map(lambda old, new: new if new.ndim else old, state, now)
        own_grad, *before = on_device(_layer(layer, (grad, current, param)))
        own_state, own_param = before
        *new, own_square = _new(optimizer, norm, own_grad, own_state, own_param)
        new_param, new_state = _where(sound, tuple(new), (own_param, own_state))
        written = _written(layer, (param, now), (new_param, where_it_was(new_state, now)))
        return (*written, square + own_square)

    return _loop(param, change, (param, state, jnp.zeros(())))


def _loop(param: chex.Array, body: Any, carry: Any) -> Any:
    """`body(layer, carry)` for each layer of a stack; of what is none, once, with None."""
    return jax.lax.fori_loop(0, len(param), body, carry) if param.ndim > 2 else body(None, carry)


def _layer(layer: Any, tree: Any) -> Any:
    """A layer of every leaf of `tree` that is no scalar; all of it for None."""
    at = lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False) if leaf.ndim else leaf
    return tree if layer is None else jax.tree.map(at, tree)


def _written(layer: Any, tree: Any, new: Any) -> Any:
    """`tree` with `new` in place of what `_layer` takes."""
    put = lambda leaf, part: jax.lax.dynamic_update_index_in_dim(leaf, part, layer, 0) if leaf.ndim else part
    return new if layer is None else jax.tree.map(put, tree, new)


def _new(optimizer: Any, norm: chex.Array, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any, chex.Array]:
    """New parameters, new optimizer state, and the square of the norm of the change."""
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(grads, opt_state, params, norm=norm)
    return optax.apply_updates(params, updates), opt_state, optax.tree.norm(updates, squared=True)


def _where(sound: chex.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, old)


def _all_finite(tree: Any) -> chex.Array:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    bad = jnp.stack([~jnp.isfinite(leaf).all() for leaf in leaves])
    # A root, not `any`: XLA repeats a chain of cheap operations inside each of the hundreds of kernels that read this
    # bit, which was more than half of compiling an update on a CPU; a root it computes once.
    return jnp.sqrt(bad.sum(dtype=jnp.float32)) == 0
