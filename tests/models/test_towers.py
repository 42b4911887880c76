import jax
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.models.towers import Tower, TowerConfig


@pytest.fixture(scope="module", params=["conv", "mixer"])
def tower(request):
    model = Tower(TowerConfig(request.param, width=8, embed_dim=16))
    params = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 12)))
    return model, params


def test_embeddings_have_unit_length(tower):
    model, params = tower
    images = jax.random.uniform(jax.random.key(1), (3, 32, 32, 3))
    texts = jax.random.normal(jax.random.key(2), (5, 12))
    for embedding, rows in (
        (model.apply(params, images, method="encode_images"), 3),
        (model.apply(params, texts, method="encode_text"), 5),
    ):
        assert embedding.shape == (rows, 16)
        np.testing.assert_allclose(jnp.linalg.norm(embedding, axis=-1), 1, rtol=1e-5)


def test_logits_are_scaled_cosines(tower):
    model, params = tower
    images = jax.random.uniform(jax.random.key(1), (3, 32, 32, 3))
    texts = jax.random.normal(jax.random.key(2), (5, 12))
    image_vectors = model.apply(params, images, method="encode_images")
    text_vectors = model.apply(params, texts, method="encode_text")
    np.testing.assert_allclose(
        model.apply(params, images, texts), 14 * image_vectors @ text_vectors.T, rtol=1e-4, atol=1e-4
    )


def test_images_of_a_batch_do_not_see_each_other(tower):
    model, params = tower
    images = jax.random.uniform(jax.random.key(1), (4, 32, 32, 3))
    together = model.apply(params, images, method="encode_images")
    alone = model.apply(params, images[2:3], method="encode_images")
    np.testing.assert_allclose(together[2:3], alone, atol=1e-5)


def test_mirrored_image_is_told_apart(tower):
    model, params = tower
    images = jnp.ones((1, 32, 32, 3)).at[:, 8:24, :12].set(0)
    vectors = model.apply(params, jnp.concatenate([images, images[:, :, ::-1]]), method="encode_images")
    assert jnp.abs(vectors[0] - vectors[1]).max() > 1e-2


def test_sizes_of_the_embedded_towers():
    shapes = [
        jax.eval_shape(Tower(config).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 384)))
        for config in (TowerConfig("conv", 40), TowerConfig("mixer", 128))
    ]
    conv, mixer = (sum(leaf.size for leaf in jax.tree.leaves(shape)) for shape in shapes)
    assert 0.8e6 < conv < 1.3e6
    assert 1.5e6 < mixer < 3e6
