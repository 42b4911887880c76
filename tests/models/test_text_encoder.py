import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from egrpo_jax.text.emoji_encoder import encode_prompts

CONFIG = TextEncoderConfig(vocab_size=20, width=16, num_layers=1, num_heads=2, pooled_dim=12)


@pytest.fixture(scope="module")
def encode():
    model = TextEncoder(CONFIG)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return lambda ids: model.apply(params, jnp.asarray(ids, jnp.int32))


def test_shapes_and_unit_length(encode):
    features = encode([[3, 4, 5, 0, 0, 0, 0, 0], [1] * 8])
    assert features.states.shape == (2, 8, 16)
    assert features.pooled.shape == (2, 12)
    np.testing.assert_allclose(jnp.linalg.norm(features.pooled, axis=-1), 1, rtol=1e-5)


def test_states_at_padding_are_zero_and_order_matters(encode):
    first, second = encode([[3, 4, 0, 0, 0, 0, 0, 0], [4, 3, 0, 0, 0, 0, 0, 0]]).states
    assert (first[2:] == 0).all()
    assert not np.allclose(first[:2], second[1::-1], atol=1e-3)


def test_an_empty_prompt_is_finite(encode):
    assert all(np.isfinite(array).all() for array in encode([[0] * 8]))


def test_wrong_length_is_refused(encode):
    with pytest.raises(AssertionError):
        encode([[1, 2, 3]])


def test_embedded_encoder_knows_meaning():
    prompts = ["cat face", "cat", "rocket", "a green cat", "lime coloured kitten"]
    pooled = encode_prompts(prompts).pooled
    cosines = pooled @ pooled.T
    assert cosines[0, 1] > 0.6 > 0.45 > cosines[0, 2]
    assert cosines[1, 3] > cosines[2, 3]


def test_features_of_a_prompt_do_not_depend_on_the_batch():
    prompts = [f"{colour} cat" for colour in ("red", "green", "blue")] * 5
    together = encode_prompts(prompts)
    assert together.states.shape == (15, 8, 192)
    alone = encode_prompts(["green cat"])
    np.testing.assert_allclose(together.pooled[1], alone.pooled[0], atol=1e-6)
    np.testing.assert_allclose(together.states[4], alone.states[0], atol=1e-5)


def test_embedded_encoder_is_small():
    from egrpo_jax.weights.assets import load_text_encoder

    _, params = load_text_encoder()
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 1_500_000
