"""Attention: its formula, the fused kernels against it, and which of them runs where."""

import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, PartitionSpec

from egrpo_jax.models.attention import (
    _choose,
    _cudnn,
    _head_by_head,
    _splash,
    _xla_attention,
    attention,
    attention_entropy,
    recorded_entropy,
    takes,
)

TPU = AbstractDevice(device_kind="TPU v5p", num_cores=1, platform="tpu")
AXES = ("data", "fsdp", "tensor")


def random_heads(tokens, keys=None, dtype=jnp.float32):
    """Query, key, value and a cotangent; logits are far apart."""
    sizes = (tokens, keys or tokens, keys or tokens, tokens)
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((2, size, 2, 64)) * 2, dtype) for size in sizes]


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(function, query, key, value, cotangent):
    result, backward = jax.vjp(function, query, key, value)
    return result, *backward(cotangent)


def errors(got, expected):
    """The largest difference in each array, of the largest value."""
    in_float = lambda x: np.asarray(x, np.float64)
    return [
        np.abs(in_float(a) - in_float(b)).max() / np.abs(in_float(b)).max() for a, b in zip(got, expected, strict=True)
    ]


def tpu_mesh(*sizes):
    return jax.sharding.use_abstract_mesh(
        AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=TPU)
    )


def test_attention_against_its_formula():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 4))
    mask = jnp.array([True, True, True, False, True])[None, None, None]
    logits = np.einsum("bnhd,bmhd->bhnm", q, k).astype(np.float64) / 2
    weights = np.exp(np.where(mask, logits, -np.inf))
    expected = np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)
    chex.assert_trees_all_close(attention(q, k, v, mask), expected.astype(np.float32), atol=1e-5)


def test_attention_where_everything_is_masked_is_the_mean():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4, 2, 8))
    mixed = attention(q, k, v, jnp.zeros((1, 1, 1, 4), bool))
    chex.assert_trees_all_close(mixed, jnp.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)


def test_attention_gradients_are_those_of_the_usual_order_of_operations():
    q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, 2, 7, 2, 8))
    ours, reference = (jax.vjp(f, 5 * q, k, v)[1](cotangent) for f in (attention, jax.nn.dot_product_attention))
    chex.assert_trees_all_close(ours, reference, atol=1e-5)


splash = functools.partial(_splash, block=128, interpret=True)


@pytest.mark.parametrize(("tokens", "keys"), [(200, None), (256, None), (100, 300)])
def test_splash_is_attention(tokens, keys):
    arrays = random_heads(tokens, keys)
    assert max(errors(with_gradients(splash, *arrays), with_gradients(_xla_attention, *arrays))) < 1e-5


def test_splash_in_bfloat16():
    arrays = random_heads(200, dtype=jnp.bfloat16)
    got, exact = (
        with_gradients(splash, *arrays),
        with_gradients(_xla_attention, *(x.astype(jnp.float32) for x in arrays)),
    )
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}
    assert max(errors(got, exact)) < 2**-6  # a few roundings
    worst = errors(with_gradients(_xla_attention, *arrays), exact)
    assert all(np.array(errors(got, exact)) < 2 * np.array(worst))


def test_splash_computes_rows_apart_and_pads_without_a_trace():
    query, key, value, _ = random_heads(130)
    mixed = splash(query, key, value)
    chex.assert_trees_all_equal(splash(query, key, value.at[1].set(9.0))[0], mixed[0])
    chex.assert_trees_all_close(_splash(query, key, value, block=256, interpret=True), mixed, atol=1e-5)


def test_splash_is_not_run_again_for_a_backward_pass_that_keeps_attention():
    def kernels(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        loss = lambda *heads: jnp.square(jax.checkpoint(splash, policy=policy)(*heads)).sum()
        traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*random_heads(200)[:3])
        return str(dce_jaxpr(traced.jaxpr, [True] * 3)[0]).count("= pallas_call[")

    assert (kernels(), kernels("attention")) == (4, 3)  # two of them are the backward pass


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_head_by_head_is_attention(dtype):
    arrays = random_heads(60, 70, dtype)
    got, expected = with_gradients(_head_by_head, *arrays), with_gradients(_xla_attention, *arrays)
    assert max(errors(got, expected)) < (1e-5 if dtype == jnp.float32 else 2**-8)


LENGTHS = jnp.array([150, 37], jnp.int32)
BACKENDS = {
    "attention": attention,
    "splash": splash,
    "head_by_head": _head_by_head,
    "cudnn": _cudnn,
}


@pytest.fixture
def cudnn_anywhere(monkeypatch):
    """jax's formula instead of the kernel; the gradients of keys that the kernel skips are NaN, as they may be."""
    plain = jax.nn.dot_product_attention

    def dot_product_attention(query, key, value, key_value_seq_lengths, implementation):
        assert implementation == "cudnn"
        within = (jnp.arange(key.shape[1]) < key_value_seq_lengths[:, None])[..., None, None]

        @jax.custom_vjp
        def undefined(x):
            return x

        undefined.defvjp(lambda x: (x, None), lambda _, g: (jnp.where(within, g, jnp.nan),))
        return plain(query, undefined(key), undefined(value), key_value_seq_lengths=key_value_seq_lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", dot_product_attention)


@pytest.mark.usefixtures("cudnn_anywhere")
@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_beyond_lengths_are_not_there(backend):
    """A sample's result, and all of its gradients, are those of its keys alone; no gradient goes beyond them."""
    query, key, value, cotangent = random_heads(70, 150)
    with_lengths = lambda *heads: BACKENDS[backend](*heads, lengths=LENGTHS)
    got = with_gradients(with_lengths, query, key, value, cotangent)
    for sample, length in enumerate(LENGTHS.tolist()):
        own, cut = slice(sample, sample + 1), slice(0, length)
        arrays = (query[own], key[own, cut], value[own, cut], cotangent[own])
        expected = with_gradients(_xla_attention, *arrays)
        parts = (got[0][own], got[1][own], got[2][own, cut], got[3][own, cut])
        assert max(errors(parts, expected)) < 1e-5
        for gradient in got[2:]:
            np.testing.assert_array_equal(gradient[sample, length:], 0)


@pytest.mark.usefixtures("cudnn_anywhere")
@pytest.mark.parametrize("backend", BACKENDS)
def test_full_lengths_change_nothing(backend):
    query, key, value, _ = random_heads(70, 150)
    full = jax.jit(BACKENDS[backend])(query, key, value, lengths=jnp.full(2, 150, jnp.int32))
    chex.assert_trees_all_close(full, _xla_attention(query, key, value), atol=1e-5)


def test_lengths_narrow_a_mask():
    query, key, value, _ = random_heads(5, 8)
    mask = jnp.arange(8) != 1
    both = attention(query, key, value, mask, lengths=jnp.array([3, 8]))
    chex.assert_trees_all_close(both[0], attention(query, key, value, mask & (jnp.arange(8) < 3))[0], atol=1e-6)
    chex.assert_trees_all_close(both[1], attention(query, key, value, mask)[1], atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "masked", "expected"), [(512, False, True), (511, False, False), (512, True, False)]
)
def test_a_cpu_goes_head_by_head_where_sequences_are_long(tokens, masked, expected):
    heads = jax.ShapeDtypeStruct((1, tokens, 2, 8), jnp.float32)
    mask = jnp.ones((tokens, tokens), bool) if masked else None
    ends = jnp.ones(1, jnp.int32)
    for lengths in (None, ends):
        traced = jax.make_jaxpr(lambda q, lengths=lengths: attention(q, q, q, mask, lengths=lengths))(heads)
        assert ("scan[" in str(traced)) == expected


@pytest.mark.parametrize(
    ("tokens", "num_heads", "dim", "expected"),
    [
        (512, 4, 128, "splash"),
        (4096, 2, 24, "splash"),
        (511, 4, 128, "xla"),
        (512, 4, 512, "xla"),
        (512, 3, 128, "xla"),
    ],
)
def test_choice_for_a_tpu_on_a_host_without_one(tokens, num_heads, dim, expected):
    query = jax.ShapeDtypeStruct((1, tokens, num_heads, dim), jnp.bfloat16)
    assert _choose("auto", query) == "xla"
    with tpu_mesh(1, 1, 2):
        assert _choose("auto", query) == expected
        assert _choose("xla", query) == "xla"
        if expected == "xla":
            with pytest.raises(ValueError, match=r"splash needs a TPU, .*bfloat16\[1, \d+, \d, \d+\] on .*TPU v5p"):
                _choose("splash", query)


def test_what_is_asked_for_and_cannot_run_is_refused():
    heads = jax.ShapeDtypeStruct((1, 512, 4, 64), jnp.bfloat16)
    for backend in ("cudnn", "splash"):
        with pytest.raises(ValueError, match=f"attention by {backend} needs .*, found|.* on .*cpu"):
            jax.eval_shape(lambda q, backend=backend: attention(q, q, q, backend=backend), heads)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("manual", [(), ("data",), ("data", "fsdp"), AXES])
def test_splash_lowers_for_a_tpu_whatever_axes_are_automatic(manual, given):
    """Its heads are spread over them: a device has a half or a quarter of the four."""
    heads = jax.ShapeDtypeStruct((2, 600, 4, 64), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((2,), jnp.int32) if given else None
    loss = lambda q, k, v, lengths: attention(q, k, v, lengths=lengths).astype(jnp.float32).sum()
    gradients = jax.grad(loss, argnums=(0, 1, 2))
    with tpu_mesh(1, 2, 2):
        if manual:
            spec = PartitionSpec(("data", "fsdp")[: len(manual)])
            gradients = jax.shard_map(
                gradients, in_specs=(spec,) * 4, out_specs=spec, axis_names=set(manual), check_vma=False
            )
        text = jax.jit(gradients).trace(heads, heads, heads, lengths).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 3
    batch, on_each = (1 if "fsdp" in manual else 2), {0: 1, 1: 1, 2: 2, 3: 4}[len(manual)]
    assert f"tensor<{batch}x{on_each}x1024x64xbf16>" in text


@pytest.mark.slow
def test_splash_compiles_for_tpus_ahead_of_time(monkeypatch):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        monkeypatch.setenv(name, value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    mesh = Mesh(np.array(devices).reshape(2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    spec = PartitionSpec("data")
    with jax.set_mesh(mesh):
        spread = jax.shard_map(
            lambda *arrays: with_gradients.__wrapped__(attention, *arrays),
            in_specs=(spec,) * 4, out_specs=spec, axis_names={"data", "fsdp"}, check_vma=False,
        )  # fmt: skip
        sharding = jax.sharding.NamedSharding(mesh, spec)
        heads = jax.ShapeDtypeStruct((2, 600, 4, 128), jnp.bfloat16, sharding=sharding)
        compiled = jax.jit(spread).lower(heads, heads, heads, heads).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "dim", "masked", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "9.0", jnp.bfloat16, 128, False, "cudnn"),
        ("NVIDIA H100 80GB HBM3", "9.0", jnp.float32, 128, False, "xla"),
        ("NVIDIA H100 80GB HBM3", "9.0", jnp.bfloat16, 20, False, "xla"),
        ("NVIDIA H100 80GB HBM3", "9.0", jnp.bfloat16, 256, False, "cudnn"),
        ("NVIDIA H100 80GB HBM3", "9.0", jnp.bfloat16, 264, False, "xla"),
        ("NVIDIA A100-SXM4-80GB", "8.0", jnp.float16, 128, False, "cudnn"),
        ("NVIDIA A100-SXM4-80GB", "8.0", jnp.bfloat16, 136, False, "xla"),
        ("NVIDIA H100 80GB HBM3", "9.0", jnp.bfloat16, 128, True, "xla"),
        ("NVIDIA GeForce RTX 2080", "7.5", jnp.bfloat16, 128, False, "xla"),
        ("AMD Instinct MI300X", "gfx942", jnp.bfloat16, 128, False, "xla"),
    ],
)
def test_choice_for_a_gpu(monkeypatch, kind, capability, dtype, dim, masked, expected):
    called = []
    device = types.SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *heads, implementation, **_: called.append(implementation) or heads[2]
    )
    heads = jax.ShapeDtypeStruct((1, 4, 2, dim), dtype)
    jax.eval_shape(lambda q, k, v: attention(q, k, v, jnp.ones((4, 4), bool) if masked else None), *[heads] * 3)
    assert called == (["cudnn"] if expected == "cudnn" else [])
    assert takes("cudnn", heads) == (expected == "cudnn" or masked)


def test_entropy_of_attention():
    """Against plain softmax; by that of uniform weights, over keys that may be attended to."""
    query, key = (jax.random.normal(jax.random.key(seed), (2, 5, 3, 8)) for seed in (0, 1))
    weights = np.asarray(jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", query, key) / np.sqrt(8), -1), np.float64)
    expected = -(weights * np.log(weights)).sum(-1).mean() / np.log(5)
    np.testing.assert_allclose(attention_entropy(query, key), expected, rtol=1e-5)
    np.testing.assert_allclose(attention_entropy(0 * query, key), 1, rtol=1e-6)
    np.testing.assert_allclose(attention_entropy(1e4 * query, key), 0, atol=1e-3)
    two = jnp.arange(5)[None, None, None] < 2
    np.testing.assert_allclose(attention_entropy(0 * query, key, two), np.log(2) / np.log(5), rtol=1e-6)
    lengths = jnp.array([2, 3])
    np.testing.assert_allclose(attention_entropy(0 * query, key, lengths=lengths), np.log(6) / np.log(25), rtol=1e-6)


def test_entropy_is_recorded_of_what_is_traced_meanwhile():
    heard, x = [], jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    scanned = lambda x: jax.lax.scan(lambda c, _: (attention(c, c, c), None), x, length=3)[0]
    with recorded_entropy(heard.append):
        jax.block_until_ready(jax.jit(lambda x: scanned(x))(x))
        jax.effects_barrier()
    assert len(heard) == 3
    np.testing.assert_allclose(heard[0], attention_entropy(x, x), rtol=1e-6)
    lengths = jnp.array([2])
    with recorded_entropy(heard.append):
        jax.block_until_ready(attention(x, x, x, lengths=lengths))
        jax.effects_barrier()
    np.testing.assert_allclose(heard.pop(), attention_entropy(x, x, lengths=lengths), rtol=1e-6)
    jax.block_until_ready(jax.jit(lambda x: scanned(2 * x))(x))
    jax.effects_barrier()
    assert len(heard) == 3
