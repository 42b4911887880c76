"""The transformer against diffusers' Z-Image, live: velocity, every gradient, bfloat16, FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from egrpo_jax.models.z_image import ZImage, forward_flops, padded  # noqa: E402
from egrpo_jax.weights.layout import export_tensors  # noqa: E402
from egrpo_jax.weights.published.z_image import z_image_layout  # noqa: E402
from tests.oracle import z_image as oracle  # noqa: E402

torch.set_num_threads(1)  # threads that wait for one another are slow where tests run side by side
cases = pytest.mark.parametrize("name", sorted(oracle.CASES))


def relative_error(got, expected):
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@cases
def test_velocity_and_all_gradients(name):
    case = oracle.CASES[name]
    expected, model = oracle.outputs(case)
    params, arguments = oracle.params(case), oracle.real(oracle.inputs(case))

    def loss(params, arguments):
        velocity = oracle.velocity(ZImage(case.config), case, params, arguments)
        return (velocity * oracle.cotangent(case)).sum(), velocity

    (_, velocity), (by_params, by_inputs) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, arguments)
    assert relative_error(velocity, expected["velocity"]) <= 1e-5
    for argument, gradient in by_inputs.items():
        assert relative_error(gradient, expected[f"gradient_{argument}"]) <= 1e-5, argument
    named = {parameter: tensor.grad for parameter, tensor in model.named_parameters()}
    ours = dict(export_tensors(z_image_layout(case.config, "diffusers"), by_params))
    assert ours.keys() == named.keys()
    for parameter, gradient in ours.items():
        if np.any(gradient) or np.any(named[parameter].numpy()):
            assert relative_error(gradient, named[parameter].numpy()) <= 1e-5, parameter


@cases
def test_golden_file_is_what_diffusers_says(name):
    golden = np.load(oracle.GOLDEN)
    for array, expected in oracle.outputs(oracle.CASES[name])[0].items():
        assert relative_error(golden[f"{name}/{array}"], expected) <= 1e-5, array


@cases
def test_bfloat16_is_as_exact_as_the_published_code(name):
    """Weights and inputs have 8 bits in all three runs, so that arithmetic alone differs.

    The published code has times in float32, whatever the weights are.
    """
    case = oracle.CASES[name]
    time = torch.from_numpy(oracle.inputs(case)["time"])
    low_arguments = {n: torch.from_numpy(a).bfloat16() for n, a in oracle.real(oracle.inputs(case)).items()}
    model = oracle.published_model(case.config).bfloat16()
    with torch.no_grad():
        low = oracle.published_velocity(model, case, {**low_arguments, "time": time}).float().numpy()
        wide = {**{n: a.float() for n, a in low_arguments.items()}, "time": time}
        reference = oracle.published_velocity(model.float(), case, wide).numpy()
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), oracle.params(case))
    ours = {n: jnp.asarray(a.numpy()) for n, a in wide.items()}
    model = ZImage(case.config, dtype=jnp.bfloat16)
    velocity = jax.jit(lambda params, ours: oracle.velocity(model, case, params, ours))(params, ours)
    error = np.linalg.norm(velocity - reference) / np.linalg.norm(reference)
    assert error <= 1.2 * np.linalg.norm(low - reference) / np.linalg.norm(reference)
    assert error < 0.05


@cases
def test_flops_are_those_that_torch_counts(name):
    """But for what the published code embeds of padding and projects of padding and text.

    A call of one sample for each, as its sequences are no longer than its prompt's.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    case = oracle.CASES[name]
    config, image = case.config, case.grid[0] * case.grid[1]
    model = oracle.published_model(config)
    for length in case.lengths:
        single = oracle.Case(config, case.grid, length, (length,))
        arguments = {n: torch.from_numpy(a) for n, a in oracle.real(oracle.inputs(single)).items()}
        # The counter does not know the fused attention of the CPU.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            oracle.published_velocity(model, single, arguments)
        rows = 2 * (padded(image) - image) + padded(length)
        beyond = rows * config.in_channels + (padded(length) - length) * config.text_dim
        assert counter.get_total_flops() == forward_flops(config, image, length) + 2 * config.width * beyond
