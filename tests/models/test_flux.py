"""The transformer: its published size, its building blocks against formulas, its symmetries."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.models.attention import apply_rope, rope_table
from egrpo_jax.models.flux import Flux, FluxConfig, forward_flops, position_ids
from tests.oracle import flux as oracle

SMALL = FluxConfig(
    in_channels=12, num_double_blocks=2, num_single_blocks=3, num_heads=2, head_dim=16, text_dim=10, pooled_dim=6,
    axes_dims=(4, 6, 6),
)  # fmt: skip
GRID = (2, 3)


def inputs(config=SMALL, batch=2, text_tokens=5):
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (batch, GRID[0] * GRID[1], config.in_channels)),
        jnp.linspace(0.2, 0.9, batch),
        jax.random.normal(keys[1], (batch, text_tokens, config.text_dim)),
        jax.random.normal(keys[2], (batch, config.pooled_dim)),
        jnp.full(batch, 3.5) if config.guidance_embed else None,
    )


def template(config=SMALL):
    """The variables of the model, shapes alone."""
    args = jax.eval_shape(lambda: inputs(config))
    return jax.eval_shape(lambda *args: Flux(config).init(jax.random.key(0), *args, grid=GRID), *args)


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


@pytest.mark.parametrize(("guidance", "count"), [(True, 11_901_408_320), (False, 11_891_178_560)])
def test_published_parameter_counts(guidance, count):
    """FLUX.1-dev and FLUX.1-schnell."""
    assert sum(leaf.size for leaf in jax.tree.leaves(template(FluxConfig(guidance_embed=guidance)))) == count


def test_velocity_is_float32_and_starts_at_zero():
    args = inputs()
    model = Flux(SMALL, dtype=jnp.bfloat16)
    start = jax.jit(lambda: model.apply(model.init(jax.random.key(0), *args, grid=GRID), *args, grid=GRID))()
    chex.assert_type(start, jnp.float32)
    chex.assert_trees_all_equal(start, jnp.zeros((2, 6, 12)))


@pytest.mark.parametrize("name", sorted(oracle.CASES))
def test_against_diffusers(name):
    """Velocity and its gradients by every input; tests/oracle compares gradients by parameters too."""
    case, golden = oracle.CASES[name], np.load(oracle.GOLDEN)
    params, arguments = oracle.params(case), oracle.inputs(case)

    def loss(arguments, params):
        got = oracle.velocity(Flux(case.config), case, params, arguments)
        return (got * oracle.cotangent(case)).sum(), got

    by_inputs, got = jax.jit(jax.grad(loss, has_aux=True))(arguments, params)
    assert relative_error(got, golden[f"{name}/velocity"]) <= 1e-5
    for argument, gradient in by_inputs.items():
        assert relative_error(gradient, golden[f"{name}/gradient_{argument}"]) <= 1e-4, argument


def relative_error(got, expected):
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("pixels", "tera"), [(512, 21.50), (720, 37.28), (1024, 74.38)])
def test_published_flops(pixels, tera):
    flops = forward_flops(FluxConfig(), (pixels // 16) ** 2, 512)
    tokens = (pixels // 16) ** 2 + 512
    assert round(flops / 1e12, 2) == tera
    # Without the vectors that modulate, which do not grow with the tokens.
    np.testing.assert_allclose(flops, 12.910e9 * tokens + 700_416 * tokens**2, rtol=2e-3)


@pytest.mark.parametrize(("remat", "unroll"), [("projections", 1), ("blocks", 1), ("blocks", 3)])
def test_remat_changes_nothing_but_memory(remat, unroll):
    model, args = Flux(SMALL, remat=remat, unroll=unroll), inputs()
    chex.assert_trees_all_equal_shapes(
        jax.eval_shape(lambda: model.init(jax.random.key(0), *args, grid=GRID)), variables()
    )
    expected = gradients(Flux(SMALL), variables(), *args)
    errors = jax.tree.map(relative_error, gradients(model, variables(), *args), expected)
    assert max(jax.tree.leaves(errors)) <= 1e-5


def test_remat_keeps_less():
    args = inputs(text_tokens=64)

    def kept(remat):
        model = Flux(SMALL, remat=remat)
        backward = lambda v: jax.vjp(lambda v: model.apply(v, *args, grid=GRID), v)[1]
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, variables())))

    assert kept("none") > 2 * kept("projections") > 4 * kept("blocks")


def test_unrolling_changes_nothing():
    args = inputs()
    expected = velocity(Flux(SMALL), variables(), *args)
    chex.assert_trees_all_close(velocity(Flux(SMALL, unroll=3), variables(), *args), expected, atol=1e-5)
    assert float(jnp.abs(expected).mean()) > 0.1


def test_every_input_matters_and_samples_do_not_mix():
    args = inputs()
    before = velocity(Flux(SMALL), variables(), *args)
    for place in range(5):
        changed = list(args)
        changed[place] = changed[place].at[0].add(0.5)
        after = velocity(Flux(SMALL), variables(), *changed)
        assert float(jnp.abs(after[0] - before[0]).max()) > 1e-3, place
        chex.assert_trees_all_close(after[1], before[1], atol=1e-5)


def test_image_positions_matter_and_text_positions_do_not():
    args = inputs()
    straight = velocity(Flux(SMALL), variables(), *args)
    turned = velocity(Flux(SMALL), variables(), args[0][:, ::-1], *args[1:])
    assert float(jnp.abs(turned[:, ::-1] - straight).max()) > 1e-3
    shuffled = velocity(Flux(SMALL), variables(), *args[:2], args[2][:, ::-1], *args[3:])
    chex.assert_trees_all_close(shuffled, straight, atol=1e-4)


def test_guidance_must_match_the_config():
    args = inputs()
    with pytest.raises(ValueError, match="guidance_embed is True"):
        jax.eval_shape(lambda: Flux(SMALL).init(jax.random.key(0), *args[:4], grid=GRID))
    with pytest.raises(ValueError, match="axes_dims"):
        FluxConfig(head_dim=64)


def test_rope_rotates_interleaved_pairs():
    ids = position_ids(1, (2, 2))
    np.testing.assert_array_equal(ids, [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]])
    cos, sin = rope_table(ids, (2, 4, 2))
    x = jax.random.normal(jax.random.key(0), (1, 5, 1, 8))
    got = np.asarray(apply_rope(x, cos, sin))[0, 4, 0]
    # Token (0, 1, 1): axis 0 does not turn; axis 1 turns by 1 and by 1 / 100; axis 2 by 1.
    pairs = np.asarray(x)[0, 4, 0].reshape(4, 2) @ np.array([1, 1j])
    expected = pairs * np.exp(1j * np.array([0.0, 1.0, 0.01, 1.0]))
    np.testing.assert_allclose(got.reshape(4, 2) @ np.array([1, 1j]), expected, atol=1e-5)
    chex.assert_trees_all_close(apply_rope(x, cos, sin)[:, :2], x[:, :2])


def test_rope_makes_attention_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    scores = []
    for shift in (0, 5):
        cos, sin = rope_table(np.array([[3 + shift], [7 + shift]]), (8,))
        rotated = apply_rope(jnp.concatenate([q, k], 1), cos, sin)
        scores.append(float((rotated[0, 0, 0] * rotated[0, 1, 0]).sum()))
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4)
