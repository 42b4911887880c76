"""Attention and rotary position embeddings, shared by every transformer here."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask
from jax.sharding import PartitionSpec

Backend: TypeAlias = Literal["auto", "xla", "cudnn", "splash"]
"""How attention is computed: `cudnn` on NVIDIA and `splash` on TPUs, fused kernels that hold no `[N, N]` weights; `xla`
anywhere; `auto`: the fused kernel of the platform where it takes the arrays, `xla` elsewhere."""

NEEDS = {
    "cudnn": "an NVIDIA GPU, Ampere or newer, bfloat16, head_dim a multiple of 8 up to 128 (Hopper: 256)",
    "splash": "a TPU, 512 tokens or more, head_dim up to 256",
}
"""The conditions that `takes` checks, in words."""

_BLOCK = 512
"""Tokens in one step of splash; sequences are padded to a multiple."""
_LONG = 512
"""Tokens from which a CPU is faster head by head."""
_RECORDS: list[Callable[[chex.Array], Any]] = []


def attention(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    mask: chex.Array | None = None,
    backend: Backend = "auto",
    lengths: chex.Array | None = None,
) -> chex.Array:
    """Softmax attention, scaled by 1/sqrt(head_dim), with float32 softmax.

    What a backward pass needs of the result bears the name "attention", for remat policies.

    Args:
      query: `[B, N, H, head_dim]`.
      key, value: `[B, M, H, head_dim]`.
      mask: boolean, broadcastable to `[B, H, N, M]`; False positions are not attended to. It goes to `xla` always.
      backend: what computes it, on the platform of the mesh that is set, else of the default device.
      lengths: int32 `[B]`, from 1 to M: keys from `lengths[b]` on are not attended to, and get no gradient. Every
        backend takes them, so that a batch of sequences of many lengths needs no `mask`. Queries are not masked: what
        comes of padding among them is finite, and means nothing.

    Returns:
      `[B, N, H, head_dim]`, in the dtype of `value`.

    Raises:
      ValueError: the backend that is asked for does not take these arrays here.
    """
    for record in _RECORDS:
        jax.debug.callback(record, attention_entropy(query, key, mask, lengths))
    chosen = "xla" if mask is not None else _choose(backend, query)
    if chosen == "splash":
        return _over_automatic_axes(query, key, value, lengths)
    if chosen == "cudnn":
        mixed = _cudnn(query, key, value, lengths)
    elif mask is None and _device().platform == "cpu" and query.shape[1] >= _LONG:
        mixed = _head_by_head(query, key, value, lengths)
    else:
        mixed = _xla_attention(query, key, value, _joined(mask, lengths, key.shape[1]))
    return checkpoint_name(mixed, "attention")


@contextlib.contextmanager
def recorded_entropy(record: Callable[[chex.Array], Any]) -> Iterator[None]:
    """Hands `attention_entropy` of every attention that is traced inside to `record`, each time that it runs."""
    _RECORDS.append(record)
    try:
        yield
    finally:
        _RECORDS.remove(record)


def attention_entropy(
    query: chex.Array, key: chex.Array, mask: chex.Array | None = None, lengths: chex.Array | None = None
) -> chex.Array:
    """The mean entropy of attention weights over B, N and H, by log M: 1 if all keys weigh alike, 0 if one has all.

    For the arguments see `attention`; a head at a time, so that no `[B, H, N, M]` is held.
    """
    batch, tokens, heads, size = query.shape
    joined = _joined(mask, lengths, key.shape[1])
    allowed = jnp.ones((1, 1, 1, 1), bool) if joined is None else joined
    allowed = jnp.broadcast_to(allowed, (batch, heads, tokens, key.shape[1]))

    def of_head(head: chex.Array) -> chex.Array:
        logits = jnp.einsum("bnd,bmd->bnm", query[:, :, head], key[:, :, head], preferred_element_type=jnp.float32)
        logits = jnp.where(allowed[:, head], logits * size**-0.5, -jnp.inf)
        log_weights = jax.nn.log_softmax(logits, axis=-1)
        return -jnp.sum(jnp.exp(log_weights) * log_weights, -1, where=allowed[:, head]).mean()

    return jax.lax.map(of_head, jnp.arange(heads)).mean() / math.log(key.shape[1])


def _before(lengths: chex.Array, tokens: int) -> chex.Array:
    """The places before the end of each sequence: boolean `[B, tokens]`."""
    return jnp.arange(tokens) < lengths[:, None]


def _joined(mask: chex.Array | None, lengths: chex.Array | None, keys: int) -> chex.Array | None:
    """One mask that says what `mask` and `lengths` do, if there is one of them."""
    if lengths is None:
        return mask
    before = _before(lengths, keys)[:, None, None]
    return before if mask is None else mask & before


def takes(backend: Backend, query: chex.Array | jax.ShapeDtypeStruct) -> bool:
    """Tells whether a backend computes heads like `query` on the platform that is computed or compiled for."""
    dim, device = query.shape[-1], _device()
    if backend == "splash":
        return device.platform == "tpu" and query.shape[1] >= _BLOCK and dim <= 256
    if backend == "cudnn" and device.device_kind.startswith("NVIDIA"):
        capability = float(jax.devices()[0].compute_capability)
        half = query.dtype in (jnp.bfloat16, jnp.float16)
        return capability >= 8 and half and dim % 8 == 0 and dim <= (256 if capability >= 9 else 128)
    return backend != "cudnn"


def _device() -> jax.Device | jax.sharding.AbstractDevice:
    """A device of the mesh that is set, or the default one: the host that compiles ahead of time has others."""
    return jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]


def _choose(backend: Backend, query: chex.Array) -> Backend:
    """The backend that runs, not "auto" any more."""
    order: tuple[Backend, ...] = ("splash", "cudnn", "xla")
    usable = [name for name in order if takes(name, query)]
    if "splash" in usable and query.shape[2] % math.prod(_automatic_axes().values()):
        usable.remove("splash")  # heads that do not divide
    if backend == "auto":
        return usable[0]
    if backend not in usable:
        needs = f"{NEEDS[backend]}, and heads that the mesh divides"
        raise ValueError(f"attention by {backend} needs {needs}; found {query.dtype}{list(query.shape)} on {_device()}")
    return backend


def _automatic_axes() -> dict[str, int]:
    """Axes of the mesh that is set over which XLA still spreads what is traced, with their devices."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: mesh.shape[axis] for axis in mesh.auto_axes}


def _cudnn(query: chex.Array, key: chex.Array, value: chex.Array, lengths: chex.Array | None) -> chex.Array:
    if lengths is not None:
        # The kernel need not write the gradients of keys that it skips: they belong to constants.
        before = _before(lengths, key.shape[1])[..., None, None]
        key, value = jnp.where(before, key, 0), jnp.where(before, value, 0)
    return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation="cudnn")


def _over_automatic_axes(
    query: chex.Array, key: chex.Array, value: chex.Array, lengths: chex.Array | None
) -> chex.Array:
    """`_splash` with the heads spread by hand: XLA cannot partition a Pallas kernel, not even over one device."""
    axes = tuple(_automatic_axes())
    if not axes:
        return _splash(query, key, value, lengths)
    heads = PartitionSpec(None, None, axes)
    specs = (heads, heads, heads, PartitionSpec())
    # check_vma knows no Pallas kernels.
    spread = jax.shard_map(_splash, in_specs=specs, out_specs=heads, axis_names=set(axes), check_vma=False)
    return spread(query, key, value, lengths)


def _splash(
    query: chex.Array,
    key: chex.Array,
    value: chex.Array,
    lengths: chex.Array | None = None,
    block: int = _BLOCK,
    interpret: bool = False,
) -> chex.Array:
    """Attention by the kernel for TPUs, on one device; `interpret` runs it anywhere, slowly."""
    scaled = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)  # the kernel does not scale
    heads = [_padded_heads(x, block) for x in (scaled, key, value)]
    sizes = (heads[0].shape[2], heads[1].shape[2])
    # Padding of keys is a segment that no query is in; results for padded queries are dropped.
    keys = jnp.arange(sizes[1])
    padding = keys >= key.shape[1] if lengths is None else keys >= lengths[:, None]
    queries = jnp.zeros((*padding.shape[:-1], sizes[0]), jnp.int32)
    segments = splash.SegmentIds(queries, padding.astype(jnp.int32))
    kernel = splash.make_splash_mha(
        splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask(sizes)] * query.shape[2]),
        block_sizes=splash.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",  # the sums of the softmax too: no second forward pass
        interpret=interpret,
    )
    mixed = jax.vmap(kernel, in_axes=(0, 0, 0, None if lengths is None else 0))(*heads, segments)
    return mixed[:, :, : query.shape[1]].swapaxes(1, 2)


def _padded_heads(x: chex.Array, block: int) -> chex.Array:
    """`[B, N, H, head_dim]` to `[B, H, blocks * block, head_dim]`."""
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % block), (0, 0)))


def _head_by_head(
    query: chex.Array, key: chex.Array, value: chex.Array, lengths: chex.Array | None = None
) -> chex.Array:
    """`_xla_attention` of a head at a time, computed again for the backward pass: a CPU's caches hold one's weights.

    On two cores, in float32, [4, 1024, 24, 128] takes 277 ms forward instead of 781, and 1037 instead of 2302 with the
    backward pass; [12, 512, 8, 64] takes 58 instead of 105, and 237 instead of 295. Shorter sequences may take longer:
    [8, 192, 8, 64] 8 ms instead of 4.
    """
    batch, tokens, num_heads, _ = query.shape
    heads = tuple(x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (query, key, value))
    masks = () if lengths is None else (jnp.repeat(_before(lengths, key.shape[1]), num_heads, axis=0),)
    mixed = jax.lax.map(jax.checkpoint(lambda head: _mix("nd", *head)), heads + masks)
    return mixed.reshape(batch, num_heads, tokens, -1).swapaxes(1, 2)


def _xla_attention(query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array | None = None) -> chex.Array:
    return _mix("bnhd", query, key, value, mask).swapaxes(1, 2)


def _mix(
    axes: str, query: chex.Array, key: chex.Array, value: chex.Array, mask: chex.Array | None = None
) -> chex.Array:
    """Attention of heads whose `axes` are a batch's, "bnhd", or one head's, "nd"; the result is `[B, H, N, head_dim]`,
    or `[N, head_dim]`."""
    keys, weighted = axes.replace("n", "m"), axes.replace("n", "").replace("d", "nm")
    logits = jnp.einsum(f"{axes},{keys}->{weighted}", query, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, -0.7 * jnp.finfo(jnp.float32).max)  # finite: a row may be masked altogether
    # Divided by the sum last: neither this pass nor its backward then normalises the large [N, N] array.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    product = f"{weighted},{keys}->{weighted[:-1]}d"
    mixed = jnp.einsum(product, weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (mixed / weights.sum(-1, keepdims=True)).astype(value.dtype)


def rope_table(ids: np.ndarray, axes_dims: Sequence[int], theta: float = 10_000.0) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine tables of the rotary embedding of several position axes.

    Computed in float64 on the host, as the published model does: float32 angles lose digits at high positions.

    Args:
      ids: `[N, axes]`, the position of each token on each axis.
      axes_dims: how many dimensions of the head rotate with each axis; all even, `head_dim` together.
      theta: base of the frequencies.

    Returns:
      Two float32 arrays `[N, head_dim / 2]`, one angle for each interleaved pair.
    """
    ids = np.asarray(ids, np.float64)
    angles = [
        ids[:, axis, None] * theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        for axis, dim in enumerate(axes_dims)
    ]
    table = np.concatenate(angles, axis=-1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def apply_rope(x: chex.Array, cos: chex.Array, sin: chex.Array) -> chex.Array:
    """Rotates interleaved pairs (x_2j, x_2j+1) of `x [B, N, H, head_dim]`, in float32.

    The angles are those of `cos` and `sin`, `[N, head_dim / 2]`, or `[B, N, head_dim / 2]` where samples differ.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
