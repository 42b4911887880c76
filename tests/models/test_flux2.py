"""The transformer: its published sizes, the places of its tokens, its symmetries; against diffusers' by a golden."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.models.flux2 import Flux2, Flux2Config, forward_flops, position_ids, swiglu
from egrpo_jax.models.lora import LoraConfig, apply_lora, init_lora
from tests.oracle import flux2 as oracle

SMALL = Flux2Config(
    in_channels=12, num_double_blocks=2, num_single_blocks=3, num_heads=2, head_dim=16, text_dim=10,
    guidance_embed=True, axes_dims=(4, 4, 4, 4),
)  # fmt: skip
KLEIN_9B = Flux2Config(num_double_blocks=8, num_single_blocks=24, num_heads=32, text_dim=12288)
DEV = Flux2Config(num_double_blocks=8, num_single_blocks=48, num_heads=48, text_dim=15360, guidance_embed=True)
GRID = (2, 3)


def inputs(config=SMALL, batch=2, text_tokens=5):
    keys = jax.random.split(jax.random.key(0), 2)
    return (
        jax.random.normal(keys[0], (batch, GRID[0] * GRID[1], config.in_channels)),
        jnp.linspace(0.2, 0.9, batch),
        jax.random.normal(keys[1], (batch, text_tokens, config.text_dim)),
        jnp.full(batch, 3.5) if config.guidance_embed else None,
    )


def template(config=SMALL):
    """The variables of the model, shapes alone."""
    args = jax.eval_shape(lambda: inputs(config))
    return jax.eval_shape(lambda *args: Flux2(config).init(jax.random.key(0), *args, grid=GRID), *args)


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
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("config", "count"),
    [(Flux2Config(), 3_875_544_576), (KLEIN_9B, 9_078_581_248), (DEV, 32_223_281_152)],
    ids=["klein-4B", "klein-9B", "dev"],
)
def test_published_parameter_counts(config, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(template(config))) == count


def test_velocity_is_float32_and_starts_at_zero():
    args = inputs()
    model = Flux2(SMALL, dtype=jnp.bfloat16)
    start = jax.jit(lambda: model.apply(model.init(jax.random.key(0), *args, grid=GRID), *args, grid=GRID))()
    chex.assert_type(start, jnp.float32)
    chex.assert_trees_all_equal(start, jnp.zeros((2, 6, 12)))


@pytest.mark.parametrize("name", sorted(oracle.CASES))
def test_against_diffusers(name):
    """Velocity and its gradients by every input; tests/oracle compares gradients by parameters too."""
    case, golden = oracle.CASES[name], np.load(oracle.GOLDEN)
    params, arguments = oracle.params(case), oracle.inputs(case)

    def loss(arguments, params):
        got = oracle.velocity(Flux2(case.config), case, params, arguments)
        return (got * oracle.cotangent(case)).sum(), got

    by_inputs, got = jax.jit(jax.grad(loss, has_aux=True))(arguments, params)
    assert relative_error(got, golden[f"{name}/velocity"]) <= 1e-5
    for argument, gradient in by_inputs.items():
        assert relative_error(gradient, golden[f"{name}/gradient_{argument}"]) <= 1e-5, argument


@pytest.mark.parametrize(
    ("config", "tera"),
    [(Flux2Config(), (10.2, 34.8)), (KLEIN_9B, (22.7, 75.5)), (DEV, (87.8, 282.6))],
    ids=["klein-4B", "klein-9B", "dev"],
)
def test_published_flops(config, tera):
    assert tuple(round(forward_flops(config, (pixels // 16) ** 2, 512) / 1e12, 1) for pixels in (512, 1024)) == tera


@pytest.mark.parametrize("remat", ["projections", "blocks"])
def test_remat_changes_nothing_but_memory(remat):
    model, args = Flux2(SMALL, remat=remat), inputs()
    chex.assert_trees_all_equal_shapes(
        jax.eval_shape(lambda: model.init(jax.random.key(0), *args, grid=GRID)), variables()
    )
    expected = gradients(Flux2(SMALL), variables(), *args)
    errors = jax.tree.map(relative_error, gradients(model, variables(), *args), expected)
    assert max(jax.tree.leaves(errors)) <= 1e-5


def test_remat_keeps_less():
    args = inputs(text_tokens=64)

    def kept(remat):
        model = Flux2(SMALL, remat=remat)
        backward = lambda v: jax.vjp(lambda v: model.apply(v, *args, grid=GRID), v)[1]
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, variables())))

    assert kept("none") > 1.5 * kept("projections") > 4 * kept("blocks")


def test_every_input_matters_and_samples_do_not_mix():
    args = inputs()
    before = velocity(Flux2(SMALL), variables(), *args)
    for place in range(4):
        changed = list(args)
        changed[place] = changed[place].at[0].add(0.5)
        after = velocity(Flux2(SMALL), variables(), *changed)
        assert float(jnp.abs(after[0] - before[0]).max()) > 1e-3, place
        chex.assert_trees_all_close(after[1], before[1], atol=1e-5)


def test_image_and_text_positions_matter():
    args = inputs()
    straight = velocity(Flux2(SMALL), variables(), *args)
    turned = velocity(Flux2(SMALL), variables(), args[0][:, ::-1], *args[1:])
    assert float(jnp.abs(turned[:, ::-1] - straight).max()) > 1e-3
    shuffled = velocity(Flux2(SMALL), variables(), *args[:2], args[2][:, ::-1], args[3])
    assert float(jnp.abs(shuffled - straight).max()) > 1e-3


def test_positions_have_a_row_a_column_and_an_axis_for_text():
    ids = [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]]
    np.testing.assert_array_equal(position_ids(3, (2, 2)), ids)


def test_the_gate_is_squashed():
    gate, up = jnp.array([2.0, 0.0]), jnp.array([3.0, 5.0])
    np.testing.assert_allclose(swiglu(gate, up), [6 / (1 + np.exp(-2)), 0], rtol=1e-6)


def test_one_pair_of_adapters_for_each_fused_layer():
    """Those of single blocks and of feed-forward parts; their ranks and names are then those of published adapters."""
    args, params = inputs(), variables()["params"]
    adapters = init_lora(jax.random.key(0), params, LoraConfig((r"(qkv_mlp|single_blocks/out|_ff/linear_.)$",), 2, 2.0))
    shapes = {name: layer["a"].shape + layer["b"].shape for name, layer in adapters["single_blocks"].items()}
    assert shapes == {"qkv_mlp": (3, 32, 2, 3, 2, 288), "out": (3, 128, 2, 3, 2, 32)}
    assert adapters["double_blocks"]["image_ff"]["linear_1"]["b"].shape == (2, 2, 192)
    apply = lambda adapters: apply_lora(Flux2(SMALL), {"params": params, "lora": adapters}, *args, grid=GRID, scale=1.0)
    changed = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    start, moved = jax.jit(apply)(adapters), jax.jit(apply)(changed)
    assert relative_error(start, velocity(Flux2(SMALL), variables(), *args)) <= 1e-5
    assert float(jnp.abs(moved - start).max()) > 1e-3


def test_sizes_and_arguments_are_checked():
    args = inputs()
    with pytest.raises(ValueError, match="guidance_embed is True"):
        jax.eval_shape(lambda: Flux2(SMALL).init(jax.random.key(0), *args[:3], grid=GRID))
    with pytest.raises(ValueError, match="guidance_embed is False"):
        jax.eval_shape(lambda: Flux2(Flux2Config()).init(jax.random.key(0), *inputs(Flux2Config())[:3], 1, grid=GRID))
    with pytest.raises(ValueError, match="axes_dims"):
        Flux2Config(head_dim=64)
