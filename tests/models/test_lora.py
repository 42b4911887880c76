"""Adapters: which layers get them, what they add, what training them costs, and that all else stays as it was.

`python -m tests.models.test_lora OUT FSDP` writes velocity and gradients as computed on the devices that there are.
"""

import functools
from pathlib import Path

import chex
import flax.linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError
from flax.traverse_util import flatten_dict

from egrpo_jax.common.errors import ConfigError, UserError
from egrpo_jax.models.flux import Flux, FluxConfig
from egrpo_jax.models.layers import Linear
from egrpo_jax.models.lora import (
    LoraConfig,
    adapted_layers,
    apply_lora,
    init_lora,
    lora_interceptor,
    merge_lora,
)
from egrpo_jax.pipelines import published
from egrpo_jax.pipelines.families import FLUX

FLOW_GRPO, DANCE_GRPO = (options.adapters(FLUX.presets) for options in (published.FLOW_GRPO, published.DANCE_GRPO))

ROOT = Path(__file__).parent.parent.parent
SMALL = FluxConfig(
    in_channels=14, num_double_blocks=2, num_single_blocks=2, num_heads=2, head_dim=16, text_dim=9, pooled_dim=6,
    axes_dims=(4, 6, 6),
)  # fmt: skip
GRID = (2, 3)
MODEL = Flux(SMALL)
EVERYWHERE = LoraConfig(rank=4, alpha=6, targets=("",))
FLOW_GRPO_LAYERS = {  # inputs and outputs, in units of the width
    "double_blocks/image_ff/linear_1": (1, 4), "double_blocks/image_ff/linear_2": (4, 1),
    "double_blocks/image_out": (1, 1), "double_blocks/image_qkv/to_k": (1, 1), "double_blocks/image_qkv/to_q": (1, 1),
    "double_blocks/image_qkv/to_v": (1, 1), "double_blocks/text_ff/linear_1": (1, 4),
    "double_blocks/text_ff/linear_2": (4, 1), "double_blocks/text_out": (1, 1), "double_blocks/text_qkv/to_k": (1, 1),
    "double_blocks/text_qkv/to_q": (1, 1), "double_blocks/text_qkv/to_v": (1, 1), "single_blocks/qkv/to_k": (1, 1),
    "single_blocks/qkv/to_q": (1, 1), "single_blocks/qkv/to_v": (1, 1),
}  # fmt: skip
DANCE_GRPO_LAYERS = {
    "double_blocks/image_out", "double_blocks/image_qkv/to_k", "double_blocks/image_qkv/to_q",
    "double_blocks/image_qkv/to_v", "single_blocks/qkv/to_k", "single_blocks/qkv/to_q", "single_blocks/qkv/to_v",
}  # fmt: skip


def inputs(config=SMALL, batch=2, text_tokens=5):
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (batch, GRID[0] * GRID[1], config.in_channels)),
        jnp.linspace(0.2, 0.9, batch),
        jax.random.normal(keys[1], (batch, text_tokens, config.text_dim)),
        jax.random.normal(keys[2], (batch, config.pooled_dim)),
        jnp.full(batch, 3.5),
    )


def abstract_params(config):
    args = jax.eval_shape(lambda: inputs(config))
    return jax.eval_shape(lambda *args: Flux(config).init(jax.random.key(0), *args, grid=GRID), *args)["params"]


def perturbed(tree, seed, size):
    """`tree` with no zeros: fresh adapters, and the last layer of a fresh model, make everything else vanish."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + jnp.float32(size * rng.standard_normal(leaf.shape)), tree)


@functools.cache
def random_params():
    init = jax.jit(functools.partial(Flux(SMALL).init, grid=GRID))
    return perturbed(init(jax.random.key(1), *inputs())["params"], 2, 0.1)


def random_lora(params, config):
    return perturbed(jax.jit(init_lora, static_argnums=2)(jax.random.key(3), params, config), 4, 0.1)


@functools.partial(jax.jit, static_argnames=("scale", "model"))
def velocity(params, lora, scale, model=MODEL):
    return apply_lora(model, {"params": params, "lora": lora}, *inputs(), grid=GRID, scale=scale)


@jax.jit
def base_velocity(params):
    return Flux(SMALL).apply({"params": params}, *inputs(), grid=GRID)


def loss(params, lora, scale, model=MODEL):
    return jnp.square(velocity(params, lora, scale, model) - 1).mean()


def paths_and_shapes(tree):
    return {path: leaf.shape for path, leaf in flatten_dict(tree, sep="/").items()}


def test_the_whole_tree_of_flow_grpo_for_flux_dev():
    lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), abstract_params(FluxConfig()), FLOW_GRPO))
    expected = {}
    for path, (rows, columns) in FLOW_GRPO_LAYERS.items():
        layers = 19 if path.startswith("double") else 38
        expected[f"{path}/a"] = (layers, 3072 * rows, 64)
        expected[f"{path}/b"] = (layers, 64, 3072 * columns)
    assert paths_and_shapes(lora) == expected
    assert sum(leaf.size for leaf in jax.tree.leaves(lora)) == 179_306_496
    assert FLOW_GRPO.scale == DANCE_GRPO.scale == 2


def test_the_whole_tree_of_dance_grpo_for_flux_dev():
    lora = jax.eval_shape(lambda: init_lora(jax.random.key(0), abstract_params(FluxConfig()), DANCE_GRPO))
    expected = {}
    for path in DANCE_GRPO_LAYERS:
        layers = 19 if path.startswith("double") else 38
        expected |= {f"{path}/a": (layers, 3072, 128), f"{path}/b": (layers, 128, 3072)}
    assert paths_and_shapes(lora) == expected


def test_parameters_of_the_base_stay_where_they_are():
    """As the model initialises and as it runs: it neither gains nor loses a path, with adapters and without."""
    params = random_params()
    lora = init_lora(jax.random.key(3), params, EVERYWHERE)
    variables = {"params": params, "lora": lora}
    run = functools.partial(apply_lora, Flux(SMALL), grid=GRID, scale=1.0, mutable=True)
    _, after = jax.jit(run)(variables, *inputs())
    assert paths_and_shapes(after) == paths_and_shapes(variables)
    chex.assert_trees_all_equal(after, variables)
    layers = {path.removesuffix("/kernel") for path in paths_and_shapes(params) if path.endswith("/kernel")}
    assert {path.rsplit("/", 1)[0] for path in paths_and_shapes(lora)} == layers == set(adapted_layers(params, ("",)))


def test_fresh_adapters_are_gaussian_and_change_nothing():
    params = random_params()
    lora = init_lora(jax.random.key(3), params, LoraConfig(FLOW_GRPO.targets, rank=16))
    for path, leaf in flatten_dict(lora, sep="/").items():
        chex.assert_type(leaf, jnp.float32)
        if path.endswith("/b"):
            assert not leaf.any()
        else:
            np.testing.assert_allclose(leaf.std(), 1 / 16, rtol=0.1)
            assert abs(float(jnp.vdot(leaf[0], leaf[1]))) < 0.2 * float(jnp.vdot(leaf[0], leaf[0]))  # layers differ
    a = flatten_dict(lora, sep="/")["double_blocks/image_qkv/to_q/a"]
    assert float(jnp.abs(a - lora["double_blocks"]["image_qkv"]["to_k"]["a"]).max()) > 0.01
    fresh = init_lora(jax.random.key(3), params, EVERYWHERE)
    chex.assert_trees_all_close(velocity(params, fresh, 1.5), base_velocity(params), atol=1e-6)


def test_without_the_collection_it_is_the_base_model_bit_for_bit():
    params = random_params()
    base = base_velocity(params)
    reference = jax.jit(functools.partial(apply_lora, Flux(SMALL), grid=GRID, scale=1.5))
    chex.assert_trees_all_equal(reference({"params": params}, *inputs()), base)
    assert float(jnp.abs(velocity(params, random_lora(params, EVERYWHERE), 1.5) - base).max()) > 0.1


@pytest.mark.parametrize("layer", [nn.Dense, Linear])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_layer_against_the_formula(layer, dtype):
    """Once, though `Linear` calls `nn.Dense` in turn, and in the precision of the layer."""
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 5), (5, 7), (5, 4), (4, 7)))
    bias = np.arange(7, dtype=np.float32)
    variables = {"params": {"kernel": w, "bias": bias}, "lora": {"a": a, "b": b}}
    got = apply_lora(layer(7, dtype=dtype), variables, x, scale=1.5)
    chex.assert_type(got, dtype)
    expected = x @ w + bias + 1.5 * (x @ a) @ b
    tolerance = 1e-5 if dtype == jnp.float32 else 0.03 * np.abs(expected).max()
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=tolerance)


@pytest.mark.parametrize("config", [EVERYWHERE, LoraConfig(FLOW_GRPO.targets, rank=4, alpha=6)])
def test_merged_weights_compute_the_same(config):
    params = random_params()
    lora = random_lora(params, config)
    merged = merge_lora(params, lora, config.scale)
    assert paths_and_shapes(merged) == paths_and_shapes(params)
    base = base_velocity(merged)
    chex.assert_trees_all_close(velocity(params, lora, config.scale), base, atol=1e-5 * float(jnp.abs(base).max()))


def test_merging_keeps_types_and_rounds_once():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params())
    lora = random_lora(params, EVERYWHERE)
    merged = merge_lora(params, lora, 1.5)["double_blocks"]["image_out"]["kernel"]
    chex.assert_type(merged, jnp.bfloat16)
    a, b = (np.asarray(lora["double_blocks"]["image_out"][name], np.float64) for name in "ab")
    exact = np.asarray(params["double_blocks"]["image_out"]["kernel"], np.float64) + 1.5 * a @ b
    np.testing.assert_allclose(merged.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_bfloat16_adapters_run_in_bfloat16():
    """The adapters of a bfloat16 model stay float32 in memory, and no float32 matmul is left in the model."""
    model = Flux(SMALL, dtype=jnp.bfloat16)
    params = random_params()
    lora = random_lora(params, EVERYWHERE)
    program = jax.make_jaxpr(lambda lora: velocity(params, lora, 1.5, model))(lora)
    projections = [
        eqn
        for eqn in equations(program.jaxpr)
        if eqn.primitive.name == "dot_general" and len(eqn.invars[1].aval.shape) == 2  # not attention
    ]
    assert len(projections) > 60
    assert {eqn.outvars[0].aval.dtype for eqn in projections} == {jnp.dtype(jnp.bfloat16)}
    exact = velocity(params, lora, 1.5)
    assert float(jnp.abs(velocity(params, lora, 1.5, model) - exact).max()) < 0.1 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("remat", ["none", "projections", "blocks"])
def test_gradients_by_the_chain_rule(remat):
    """Of W + s A B: the gradient by A is s G B^T and by B is s A^T G, where G is the base model's by W."""
    params, scale = random_params(), EVERYWHERE.scale
    lora = random_lora(params, EVERYWHERE)
    got = flatten_dict(jax.grad(loss, argnums=1)(params, lora, scale, Flux(SMALL, remat=remat)), sep="/")
    base_loss = lambda params: jnp.square(base_velocity(params) - 1).mean()
    by_kernel = flatten_dict(jax.grad(base_loss)(merge_lora(params, lora, scale)), sep="/")
    flat = flatten_dict(lora, sep="/")
    for path in adapted_layers(params, ("",)):
        gradient = np.asarray(by_kernel[f"{path}/kernel"], np.float64)
        a, b = np.asarray(flat[f"{path}/a"], np.float64), np.asarray(flat[f"{path}/b"], np.float64)
        for name, expected in (
            ("a", scale * gradient @ b.swapaxes(-1, -2)),
            ("b", scale * a.swapaxes(-1, -2) @ gradient),
        ):
            np.testing.assert_allclose(
                got[f"{path}/{name}"], expected, atol=1e-4 * np.abs(expected).max(), err_msg=path
            )


def equations(jaxpr):
    """All equations of a program, those of its loops and calls included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def kernel_shaped_products(function, argument, params):
    """Matrix products whose result has the shape of a kernel, as the gradients by kernels do."""
    kernels = {shape[-2:] for path, shape in paths_and_shapes(params).items() if path.endswith("/kernel")}
    kernels |= {shape[::-1] for shape in kernels}
    products = [
        eqn for eqn in equations(jax.make_jaxpr(function)(argument).jaxpr) if eqn.primitive.name == "dot_general"
    ]
    return [eqn for eqn in products if eqn.outvars[0].aval.shape in kernels]


def test_the_base_gets_no_gradient_and_no_memory_for_one():
    params = random_params()
    config = LoraConfig(FLOW_GRPO.targets, rank=3, alpha=3)
    lora = random_lora(params, config)
    assert len(kernel_shaped_products(jax.grad(lambda params: loss(params, lora, 1.0)), params, params)) > 20
    assert not kernel_shaped_products(jax.grad(lambda lora: loss(params, lora, 1.0)), lora, params)


class Block(nn.Module):
    """A block with a name of its own for its layer, as a scanned stack has."""

    @nn.compact
    def __call__(self, x):
        return x + jnp.tanh(Linear(x.shape[-1], name="layer")(x)), None


def stack(block):
    return nn.scan(block, variable_axes={"params": 0, "lora": 0}, split_rngs={"params": True}, length=3)()


def test_recomputing_blocks_changes_nothing():
    """Under `nn.remat` the backward pass runs the adapters a second time."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 8))
    params = stack(Block).init(jax.random.key(1), x)["params"]
    lora = random_lora(params, LoraConfig(rank=2, alpha=3, targets=("layer$",)))
    results = []
    for block in (Block, nn.remat(Block)):
        objective = lambda lora: jnp.square(
            apply_lora(stack(block), {"params": params, "lora": lora}, x, scale=1.5)[0]
        ).mean()
        results.append(jax.jit(jax.value_and_grad(objective))(lora))
    chex.assert_trees_all_close(*results, atol=1e-6)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(results[0]))
    changed = x
    for kernel in merge_lora(params, lora, 1.5)["layer"]["kernel"]:
        changed = changed + jnp.tanh(changed @ kernel)  # biases start at zero
    chex.assert_trees_all_close(results[0][0], jnp.square(changed).mean(), rtol=1e-5)


def test_a_model_that_is_called_again_inside_itself_is_adapted_each_time():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = Linear(x.shape[-1], name="layer")
            return layer(layer(x))

    x = jax.random.normal(jax.random.key(0), (3, 8))
    params = Twice().init(jax.random.key(1), x)["params"]
    lora = random_lora(params, LoraConfig(rank=2, alpha=3, targets=("layer$",)))
    kernel = merge_lora(params, lora, 1.5)["layer"]["kernel"]
    got = apply_lora(Twice(), {"params": params, "lora": lora}, x, scale=1.5)
    chex.assert_trees_all_close(got, x @ kernel @ kernel, atol=1e-4)


def test_an_interceptor_survives_a_failed_call():
    variables = {
        "params": {"kernel": jnp.ones((5, 7)), "bias": jnp.zeros(7)},
        "lora": {"a": jnp.ones((5, 2)), "b": jnp.ones((2, 7))},
    }
    layer = Linear(7)
    with nn.intercept_methods(lora_interceptor(1.0)):
        with pytest.raises(ScopeParamShapeError):
            layer.apply(variables, jnp.ones((1, 4)))
        chex.assert_trees_all_close(layer.apply(variables, jnp.ones((1, 5))), jnp.full((1, 7), 15.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"config\.rank: found 0"),
        ({"alpha": 0.0}, r"config\.alpha: found 0"),
        ({"targets": ()}, r"config\.targets: found \(\)"),
        ({"targets": ("to_q", "(")}, r"config\.targets: found '\('.*regular expression"),
    ],
)
def test_wrong_configs_name_the_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**{"targets": ("image_out",)} | changes)


def test_a_target_that_fits_no_layer_is_named():
    with pytest.raises(UserError, match=r"'attn\.to_q' is found in no .*double_blocks/image_out"):
        init_lora(jax.random.key(0), abstract_params(SMALL), LoraConfig(targets=("image_out", "attn.to_q")))
