"""The T5 v1.1 encoder against transformers' own, run live."""

import jax
import numpy as np
import pytest

from egrpo_jax.models.t5 import T5Encoder, forward_flops, relative_buckets
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.layout import export_tensors
from egrpo_jax.weights.published.t5 import IGNORED, config_from_transformers, t5_layout
from tests.layouts import import_tensors
from tests.models.test_t5 import our_bfloat16_error, relative_error, template
from tests.oracle.t5 import CASES, GOLDEN, cases, inputs, outputs, published_model

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


@pytest.mark.parametrize("name", CASES)
def test_transformers_own_tensors_and_config_give_its_outputs(name):
    case = CASES[name]
    model = published_model(case)
    tensors = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    config = config_from_transformers(Published(model.config.to_dict()))
    assert config == case.config
    layout = t5_layout(config)
    assert {e.name for e in layout} == tensors.keys() - {pattern.replace("\\", "") for pattern in IGNORED}
    params = import_tensors(layout, tensors, template(config))
    states = jax.jit(T5Encoder(config).apply)({"params": params}, inputs(case))
    assert relative_error(np.asarray(states), outputs(case, model)["states"]) <= 1e-5
    for key, tensor in export_tensors(layout, params):
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_exact_as_transformers(made, name):
    for key, error in our_bfloat16_error(CASES[name]).items():
        assert error <= 1.2 * made[name][f"bf16_error_{key}"], key


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 20), (12, 50), (64, 300)])
def test_every_distance_has_the_published_bucket(num_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention

    places = torch.arange(700)
    expected = T5Attention._relative_position_bucket(
        places[None] - places[:, None], num_buckets=num_buckets, max_distance=max_distance
    )
    np.testing.assert_array_equal(relative_buckets(700, num_buckets, max_distance), expected)


@pytest.mark.parametrize("name", CASES)
def test_operations_as_torch_counts_them(name):
    from torch.utils.flop_counter import FlopCounterMode

    case = CASES[name]
    with FlopCounterMode(display=False) as counter:
        outputs(case, published_model(case))
    assert counter.get_total_flops() == case.batch * forward_flops(case.config, case.length)
