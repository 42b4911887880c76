"""The transformer: its published sizes, the published code's velocities (golden files), positions, who sees whom."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from egrpo_jax.models.sd3 import Sd3, Sd3Config, forward_flops
from tests.oracle import sd3 as oracle

MEDIUM = Sd3Config()
LARGE = Sd3Config(num_blocks=38, num_dual_blocks=0, num_heads=38, max_grid=192)
SMALL = Sd3Config(
    in_channels=12, num_blocks=4, num_dual_blocks=1, num_heads=2, head_dim=8, text_dim=10, pooled_dim=6, max_grid=7,
)  # fmt: skip
GRID = (2, 3)


def inputs(config=SMALL, batch=2, text_tokens=5):
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (batch, GRID[0] * GRID[1], config.in_channels)),
        jnp.linspace(0.2, 0.9, batch),
        jax.random.normal(keys[1], (batch, text_tokens, config.text_dim)),
        jax.random.normal(keys[2], (batch, config.pooled_dim)),
    )


def template(config=SMALL):
    """The variables of the model, shapes alone."""
    args = jax.eval_shape(lambda: inputs(config))
    return jax.eval_shape(lambda *args: Sd3(config).init(jax.random.key(0), *args, grid=GRID), *args)


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


@pytest.mark.parametrize(("config", "count"), [(MEDIUM, 2_243_171_520), (LARGE, 8_056_627_520)])
def test_published_parameter_counts(config, count):
    """SD3.5 Medium and Large, without the positions, which nobody trains."""
    params = template(config)["params"]
    assert params["positions"].shape == (config.max_grid**2, config.width)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) - params["positions"].size == count


def test_stacks_of_no_blocks_do_not_exist():
    stacks = lambda config: {name for name in template(config)["params"] if name.endswith("blocks")}
    assert stacks(MEDIUM) == {"dual_blocks", "plain_blocks", "last_blocks"}
    assert stacks(LARGE) == {"plain_blocks", "last_blocks"}
    assert stacks(dataclasses.replace(SMALL, num_dual_blocks=3)) == {"dual_blocks", "last_blocks"}
    leading = {
        path.split("/")[0]: leaf.shape[0] for path, leaf in flatten_dict(template(MEDIUM)["params"], sep="/").items()
    }
    assert [leading[f"{kind}_blocks"] for kind in ("dual", "plain", "last")] == [13, 10, 1]


def test_velocity_is_float32_and_starts_at_zero():
    args = inputs()
    model = Sd3(SMALL, dtype=jnp.bfloat16)
    start = jax.jit(lambda: model.apply(model.init(jax.random.key(0), *args, grid=GRID), *args, grid=GRID))()
    chex.assert_type(start, jnp.float32)
    chex.assert_trees_all_equal(start, jnp.zeros((2, 6, 12)))


@pytest.mark.parametrize("name", sorted(oracle.CASES))
def test_against_diffusers(name):
    """Velocity and its gradients by every input; tests/oracle compares gradients by parameters too."""
    case, golden = oracle.CASES[name], np.load(oracle.GOLDEN)
    params, arguments = oracle.params(case), oracle.inputs(case)

    def loss(arguments, params):
        got = oracle.velocity(Sd3(case.config), case, params, arguments)
        return (got * oracle.cotangent(case)).sum(), got

    by_inputs, got = jax.jit(jax.grad(loss, has_aux=True))(arguments, params)
    assert relative_error(got, golden[f"{name}/velocity"]) <= 1e-5
    for argument, gradient in by_inputs.items():
        assert relative_error(gradient, golden[f"{name}/gradient_{argument}"]) <= 1e-5, argument


@pytest.mark.parametrize(
    ("config", "pixels", "tera"),
    [(MEDIUM, 512, 2.44), (MEDIUM, 1024, 11.25), (LARGE, 512, 7.98), (LARGE, 1024, 31.12)],
)
def test_published_flops(config, pixels, tera):
    assert round(forward_flops(config, (pixels // 16) ** 2, 333) / 1e12, 2) == tera


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["projections", "blocks"])
def test_remat_changes_nothing_but_memory(remat):
    model, args = Sd3(SMALL, remat=remat), inputs()
    chex.assert_trees_all_equal_shapes(
        jax.eval_shape(lambda: model.init(jax.random.key(0), *args, grid=GRID)), variables()
    )
    expected = gradients(Sd3(SMALL), variables(), *args)
    errors = jax.tree.map(relative_error, gradients(model, variables(), *args), expected)
    assert max(jax.tree.leaves(errors)) <= 1e-5


def test_remat_keeps_less():
    args = inputs(text_tokens=64)

    def kept(remat):
        model = Sd3(SMALL, remat=remat)
        backward = lambda v: jax.vjp(lambda v: model.apply(v, *args, grid=GRID), v)[1]
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, variables())))

    assert kept("none") > 2 * kept("projections") > 2 * kept("blocks")


def test_every_input_matters_and_samples_do_not_mix():
    args = inputs()
    before = velocity(Sd3(SMALL), variables(), *args)
    for place in range(4):
        changed = list(args)
        changed[place] = changed[place].at[0].add(0.5)
        after = velocity(Sd3(SMALL), variables(), *changed)
        assert float(jnp.abs(after[0] - before[0]).max()) > 1e-3, place
        chex.assert_trees_all_close(after[1], before[1], atol=1e-5)


def test_every_trained_parameter_matters_but_queries_that_nobody_hears():
    """The last block's text asks, and what it is told is dropped; nor are the stored positions trained."""
    flat = flatten_dict(gradients(Sd3(SMALL), variables(), *inputs())["params"], sep="/")
    silent = {path for path, gradient in flat.items() if not np.abs(gradient).max()}
    queries = {f"last_blocks/text_qkv/{name}" for name in ("to_q/kernel", "to_q/bias", "norm_q/scale")}
    assert silent == {"positions"} | queries


def test_image_positions_matter_and_text_positions_do_not():
    args = inputs()
    straight = velocity(Sd3(SMALL), variables(), *args)
    turned = velocity(Sd3(SMALL), variables(), args[0][:, ::-1], *args[1:])
    assert float(jnp.abs(turned[:, ::-1] - straight).max()) > 1e-3
    shuffled = velocity(Sd3(SMALL), variables(), *args[:2], args[2][:, ::-1], args[3])
    chex.assert_trees_all_close(shuffled, straight, atol=1e-4)


def test_positions_are_the_middle_of_the_table():
    """Of 7x7, rows 2 and 3 and columns 2 to 4 are a grid of 2x3's; all others count for nothing."""
    args, before = inputs(), velocity(Sd3(SMALL), variables(), *inputs())
    used = np.zeros((7, 7, 1), np.float32)
    used[2:4, 2:5] = 1
    changed = lambda change: {
        "params": variables()["params"] | {"positions": variables()["params"]["positions"] + change}
    }
    outside = velocity(Sd3(SMALL), changed((1 - used).reshape(49, 1)), *args)
    np.testing.assert_array_equal(outside, before)
    lone = np.zeros((7, 7, SMALL.width), np.float32)
    for row, column in [(2, 2), (3, 4)]:
        lone[:] = 0
        lone[row, column, 3] = 1
        after = velocity(Sd3(SMALL), changed(lone.reshape(49, -1)), *args)
        assert float(jnp.abs(after - before).max()) > 1e-3


def test_sizes_are_checked():
    args = jax.eval_shape(inputs)
    wide = jax.ShapeDtypeStruct((2, 8, 12), jnp.float32)
    with pytest.raises(ValueError, match="grid 1x8 is larger than the table of positions, 7x7"):
        jax.eval_shape(lambda *args: Sd3(SMALL).init(jax.random.key(0), *args, grid=(1, 8)), wide, *args[1:])
    with pytest.raises(ValueError, match="in_channels 6 must be a multiple of 4"):
        Sd3Config(in_channels=6)
    with pytest.raises(ValueError, match="num_dual_blocks 4 must be below num_blocks 4"):
        Sd3Config(num_blocks=4, num_dual_blocks=4)
