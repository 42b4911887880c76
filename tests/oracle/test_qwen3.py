"""Qwen3 against transformers' own, run live: states, gradients, both kinds of attention, config.json, FLOPs."""

import re

import jax
import numpy as np
import pytest

from egrpo_jax.models.qwen3 import Qwen3, forward_flops
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.layout import export_tensors
from egrpo_jax.weights.published.qwen3 import config_from_transformers, ignored, qwen3_layout
from tests.layouts import import_tensors
from tests.models.test_qwen3 import our_bfloat16_error, random_params, relative_error, template
from tests.oracle.qwen3 import CASES, GOLDEN, cases, cotangent, inputs, outputs, published_model, published_states

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def made():
    return cases()


def test_golden_file_is_up_to_date(made):
    flat = {f"{case}/{key}": array for case, arrays in made.items() for key, array in arrays.items()}
    with np.load(GOLDEN) as file:
        assert flat.keys() == set(file.files)
        for key, array in flat.items():
            # Rounding in bfloat16 differs between processors.
            np.testing.assert_allclose(array, file[key], rtol=0.2 if "/bf16_" in key else 0, atol=1e-4, err_msg=key)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_transformers_own_tensors_and_config_give_its_states(name, attention):
    case = CASES[name]
    model = published_model(case, attention=attention)
    tensors = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    config, count = config_from_transformers(Published(model.config.to_dict())), max(case.layers)
    assert config == case.config
    layout = qwen3_layout(count, prefix="")
    params = import_tensors(layout, tensors, template(config, case.layers))
    states = jax.jit(Qwen3(config, case.layers).apply)({"params": params}, *inputs(case))
    assert relative_error(np.asarray(states), outputs(case, model)["states"]) <= 1e-5
    for key, tensor in export_tensors(layout, params):
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key)
    beyond = tensors.keys() - {e.name for e in layout}
    assert len(beyond) == 11 * (config.num_layers - count) + 1
    assert all(any(re.fullmatch(pattern, key) for pattern in ignored(config, count)) for key in beyond)


@pytest.mark.parametrize("name", CASES)
def test_gradients(name):
    case = CASES[name]
    model = published_model(case)
    (published_states(model, case) * torch.from_numpy(cotangent(case))).sum().backward()
    named = {f"model.{parameter}": tensor.grad for parameter, tensor in model.named_parameters()}

    def loss(params):
        return (Qwen3(case.config, case.layers).apply({"params": params}, *inputs(case)) * cotangent(case)).sum()

    gradients = jax.jit(jax.grad(loss))(random_params(case.config, case.layers))
    ours = dict(export_tensors(qwen3_layout(max(case.layers)), gradients))
    assert len(ours) == 1 + 11 * max(case.layers)
    for parameter, gradient in ours.items():
        assert relative_error(gradient, named[parameter].numpy()) <= 1e-5, parameter


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_exact_as_transformers(made, name):
    for key, error in our_bfloat16_error(CASES[name]).items():
        assert error <= 1.2 * made[name][f"bf16_error_{key}"], key


@pytest.mark.parametrize("name", CASES)
def test_operations_as_torch_counts_them(name):
    from torch.utils.flop_counter import FlopCounterMode

    case = CASES[name]
    with FlopCounterMode(display=False) as counter:
        outputs(case, published_model(case))
    every_layer = [case.config.num_layers]
    assert counter.get_total_flops() == len(case.real) * forward_flops(case.config, case.length, every_layer)
