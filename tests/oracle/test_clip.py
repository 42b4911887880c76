"""CLIP's text encoder against transformers' own, run live."""

import jax
import numpy as np
import pytest

from egrpo_jax.models.clip import ClipText
from egrpo_jax.models.layers import stack_flops
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.layout import export_tensors
from egrpo_jax.weights.published.clip import clip_text_layout, text_prefix
from tests.layouts import import_tensors
from tests.models.test_clip import our_bfloat16_error, relative_error, template
from tests.oracle.clip import CASES, GOLDEN, cases, inputs, outputs, published_model

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
            np.testing.assert_allclose(array, file[key], rtol=0.2 if "/bf16_" in key else 0, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_transformers_own_tensors_and_config_give_its_outputs(name):
    """From its state dict as it is spelled now, and the config that it would save."""
    case = CASES[name]
    model = published_model(case)
    tensors = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    config = case.read(Published(model.config.to_dict()))
    assert config == case.config
    layout = clip_text_layout(config, text_prefix(tensors))
    assert {e.name for e in layout} == tensors.keys()
    params = import_tensors(layout, tensors, template(config))
    features = jax.jit(ClipText(config).apply)({"params": params}, inputs(case))
    for key, expected in outputs(case, model).items():
        assert relative_error(np.asarray(getattr(features, key)), expected) <= 1e-5, key
    for key, tensor in export_tensors(layout, params):
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key)


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
    projection = 2 * case.config.transformer.width * (case.config.projection_dim or 0)
    flops = stack_flops(case.config.transformer, case.length) + projection
    assert counter.get_total_flops() == case.batch * flops
