"""The transformer: its published size, where its tokens lie, what padding may change and what it may not."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.models.attention import rope_table
from egrpo_jax.models.lora import LoraConfig, apply_lora, init_lora, merge_lora
from egrpo_jax.models.z_image import ZImage, ZImageConfig, forward_flops, padded, rope_tables
from tests.oracle import z_image as oracle

SMALL = ZImageConfig(
    in_channels=12, num_layers=2, num_refiner_layers=1, num_heads=2, head_dim=16, text_dim=10, axes_dims=(4, 6, 6),
    axes_lens=(128, 16, 16),
)  # fmt: skip
GRID = (2, 3)


def inputs(config=SMALL, batch=2, text_tokens=40):
    keys = jax.random.split(jax.random.key(0), 2)
    return (
        jax.random.normal(keys[0], (batch, GRID[0] * GRID[1], config.in_channels)),
        jnp.linspace(0.2, 0.9, batch),
        jax.random.normal(keys[1], (batch, text_tokens, config.text_dim)),
        jnp.arange(5, 5 + batch, dtype=jnp.int32),
    )


def template(config=SMALL):
    """The variables of the model, shapes alone."""
    args = jax.eval_shape(lambda: inputs(config))
    return jax.eval_shape(lambda *args: ZImage(config).init(jax.random.key(0), *args, grid=GRID), *args)


@functools.cache
def variables():
    """Parameters with no zeros: freshly initialised ones make the velocity vanish."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), template())


@functools.partial(jax.jit, static_argnums=0)
def velocity(model, variables, *args):
    return model.apply(variables, *args, grid=GRID)


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, variables, *args):
    return jax.grad(lambda variables: jnp.square(model.apply(variables, *args, grid=GRID)).sum())(variables)


def relative_error(got, expected):
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))


def test_published_parameter_count():
    assert sum(leaf.size for leaf in jax.tree.leaves(template(ZImageConfig()))) == 6_154_908_736


def test_velocity_is_float32_and_starts_at_zero():
    args = inputs()
    model = ZImage(SMALL, dtype=jnp.bfloat16)
    start = jax.jit(lambda: model.apply(model.init(jax.random.key(0), *args, grid=GRID), *args, grid=GRID))()
    chex.assert_type(start, jnp.float32)
    chex.assert_trees_all_equal(start, jnp.zeros((2, 6, 12)))


@pytest.mark.parametrize("name", sorted(oracle.CASES))
def test_against_diffusers(name):
    """Velocity and its gradients by every input; tests/oracle compares gradients by parameters too."""
    case, golden = oracle.CASES[name], np.load(oracle.GOLDEN)
    params, arguments = oracle.params(case), oracle.real(oracle.inputs(case))

    def loss(arguments, params):
        got = oracle.velocity(ZImage(case.config), case, params, arguments)
        return (got * oracle.cotangent(case)).sum(), got

    by_inputs, got = jax.jit(jax.grad(loss, has_aux=True))(arguments, params)
    assert relative_error(got, golden[f"{name}/velocity"]) <= 1e-5
    for argument, gradient in by_inputs.items():
        assert relative_error(gradient, golden[f"{name}/gradient_{argument}"]) <= 1e-5, argument


@pytest.mark.parametrize(
    ("pixels", "text", "tera"), [(512, 128, 13.7), (1024, 128, 56.6), (512, 512, 18.5), (1024, 512, 62.5)]
)
def test_published_flops(pixels, text, tera):
    image = (pixels // 16) ** 2
    flops = forward_flops(ZImageConfig(), image, text)
    assert round(flops / 1e12, 1) == tera
    # The main layers alone, but for what modulates them; the refiners are 6 % of them.
    main = 30 * (353.9e6 * (image + text) + 15_360 * (image + text) ** 2)
    assert main < flops < 1.08 * main


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["projections", "blocks"])
def test_remat_changes_nothing_but_memory(remat):
    model, args = ZImage(SMALL, remat=remat), inputs()
    expected = gradients(ZImage(SMALL), variables(), *args)
    errors = jax.tree.map(relative_error, gradients(model, variables(), *args), expected)
    assert max(jax.tree.leaves(errors)) <= 1e-5


def test_remat_keeps_less():
    args = inputs()

    def kept(remat):
        model = ZImage(SMALL, remat=remat)
        backward = lambda v: jax.vjp(lambda v: model.apply(v, *args, grid=GRID), v)[1]
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, variables())))

    assert kept("none") > 2 * kept("projections") > 2.5 * kept("blocks")


def test_every_input_matters_and_samples_do_not_mix():
    args = inputs()
    before = velocity(ZImage(SMALL), variables(), *args)
    assert float(jnp.abs(before).mean()) > 0.1
    for place in range(4):
        changed = list(args)
        changed[place] = changed[place].at[0].add(0.5 if place < 3 else 1)
        after = velocity(ZImage(SMALL), variables(), *changed)
        assert float(jnp.abs(after[0] - before[0]).max()) > 1e-3, place
        chex.assert_trees_all_close(after[1], before[1], atol=1e-5)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64])
def test_padding_and_neighbours_change_nothing(length):
    """Whatever lies beyond a prompt, of whatever length, and however long its neighbour is."""
    latents, time, text, _ = inputs(text_tokens=64)
    lengths = jnp.array([length, 50])
    expected = velocity(ZImage(SMALL), variables(), latents, time, text, lengths)
    for tokens, filling, neighbour in ((64, 3.0, 7), (96, -2.0, 50), (81, 1.0, 64)):
        padding = jnp.full((2, tokens, 10), filling).at[:, :64].set(text)
        padding = padding.at[0, length:].set(filling)
        args = (latents, time, padding, jnp.array([length, neighbour]))
        chex.assert_trees_all_close(velocity(ZImage(SMALL), variables(), *args)[0], expected[0], atol=2e-5)


def test_learned_padding_is_attended_to():
    """That of the image where its tokens are no multiple of 32; that of a prompt up to the next multiple."""
    args = inputs(text_tokens=64)
    args = (*args[:3], jnp.array([32, 33], jnp.int32))
    before = velocity(ZImage(SMALL), variables(), *args)
    for name, moved in (("image_pad", (True, True)), ("text_pad", (False, True))):
        params = dict(variables()["params"])
        params[name] = params[name][:, ::-1]
        after = velocity(ZImage(SMALL), {"params": params}, *args)
        for sample in range(2):
            assert (float(jnp.abs(after[sample] - before[sample]).max()) > 1e-3) == moved[sample], (name, sample)


def test_text_beyond_a_prompt_has_no_gradient():
    latents, time, text, lengths = inputs()
    loss = lambda text: velocity(ZImage(SMALL), variables(), latents, time, text, lengths).sum()
    by_text = jax.grad(loss)(text)
    for sample, length in enumerate(lengths.tolist()):
        np.testing.assert_array_equal(by_text[sample, length:], 0)
        assert (jnp.abs(by_text[sample, :length]).max(-1) > 0).all()


def test_adapters_of_every_stack_act_as_merged_weights_do():
    config = LoraConfig(rank=2, alpha=3, targets=(r"/(qkv/to_[qkv]|out|ff/linear_[123])$",))
    params, args = variables()["params"], inputs()
    lora = init_lora(jax.random.key(1), params, config)
    assert len(lora) == 3
    lora = jax.tree.map(lambda leaf: 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), lora)
    scale = config.scale
    adapted = jax.jit(
        lambda lora: apply_lora(ZImage(SMALL), {"params": params, "lora": lora}, *args, grid=GRID, scale=scale)
    )(lora)
    merged = velocity(ZImage(SMALL), {"params": merge_lora(params, lora, scale)}, *args)
    chex.assert_trees_all_close(adapted, merged, rtol=2e-5, atol=1e-4)  # velocities are as large as 12
    assert float(jnp.abs(merged - velocity(ZImage(SMALL), variables(), *args)).max()) > 1e-2


def test_where_tokens_lie():
    """Text at (n + 1, 0, 0), the image one after its prompt's padded end, its padding at the origin."""
    (cos, sin), text = rope_tables(SMALL, GRID, jnp.array([32, 64]), 64)
    chex.assert_shape([cos, sin], (2, 32, 8))
    for sample, first in enumerate((33, 65)):
        ids = [(first, row, column) for row in range(2) for column in range(3)] + [(0, 0, 0)] * 26
        for got, expected in zip((cos, sin), rope_table(np.array(ids), (4, 6, 6), 256.0), strict=True):
            np.testing.assert_array_equal(got[sample], expected)
    chex.assert_trees_all_equal(text, rope_table(np.array([(n + 1, 0, 0) for n in range(64)]), (4, 6, 6), 256.0))
    assert [padded(tokens) for tokens in (0, 1, 32, 33)] == [0, 32, 32, 64]


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="axes_dims"):
        ZImageConfig(head_dim=64)
    with pytest.raises(ValueError, match="in_channels 6 must be"):
        ZImageConfig(in_channels=6)
    ends = jnp.array([32])
    rope_tables(SMALL, (16, 16), ends, 126)
    for grid, tokens in (((17, 1), 32), ((1, 17), 32), ((1, 1), 128)):
        with pytest.raises(ValueError, match=r"axes_lens \(128, 16, 16\) must be at least"):
            rope_tables(SMALL, grid, ends, tokens)
