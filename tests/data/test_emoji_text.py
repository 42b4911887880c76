import numpy as np

from egrpo_jax.data.emoji_text import encode_prompts, flow_conditioning


def test_flow_conditioning_has_pooled_components_of_variance_one():
    prompts = ["red heart", "cat face", "zqx"]
    plain, scaled = encode_prompts(prompts), flow_conditioning(prompts)
    np.testing.assert_allclose(np.square(scaled.pooled).mean(-1), 1, rtol=1e-4)
    np.testing.assert_allclose(scaled.pooled / plain.pooled, 384**0.5, rtol=1e-4)
    np.testing.assert_array_equal(scaled.states, plain.states)
    assert scaled.pooled.dtype == np.float32


def test_padding_to_powers_of_two_does_not_show():
    prompts = [f"{number} cats" for number in range(9)]
    assert encode_prompts(prompts).pooled.shape == (9, 384)
    np.testing.assert_allclose(encode_prompts(prompts[:8]).pooled, encode_prompts(prompts).pooled[:8], atol=1e-6)
