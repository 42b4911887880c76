"""The published files of the T5 v1.1 encoder, complete and exact, and its config.json."""

import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.t5 import T5Config, T5Encoder
from egrpo_jax.weights.configs import Published
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.published.t5 import IGNORED, config_from_transformers, t5_layout
from tests.layouts import import_tensors

PUBLISHED = json.loads((Path(__file__).parents[2] / "golden" / "t5_xxl_encoder_shapes.json").read_text())
SMALL = T5Config(vocab_size=10, width=6, num_layers=3, num_heads=2, head_dim=4, mlp_dim=5)


def template(config):
    """Shapes of the parameter tree."""
    return jax.eval_shape(T5Encoder(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]


def random_params(config):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), template(config))


def test_every_published_tensor_by_name_and_shape():
    layout = t5_layout(T5Config())
    assert len(layout) == len({e.name for e in layout}) == 219
    shapes = published_shapes(layout, template(T5Config()))
    assert shapes == {name: tuple(shape) for name, shape in PUBLISHED.items()}


def test_every_number_of_our_tree_is_held_once():
    flat = flatten_dict(template(T5Config()), sep="/")
    held = [(leaf.path, leaf.layer) for e in t5_layout(T5Config()) for leaf in e.leaves]
    expected = {(path, layer) for path in flat for layer in (range(24) if path.startswith("blocks/") else [None])}
    assert len(held) == len(expected)
    assert set(held) == expected


def test_export_then_import_changes_nothing():
    params = random_params(SMALL)
    layout = t5_layout(SMALL)
    tensors = dict(export_tensors(layout, params))
    assert {name: tensor.shape for name, tensor in tensors.items()} == published_shapes(layout, params)
    chex.assert_trees_all_equal(import_tensors(layout, tensors, template(SMALL)), params)


def test_kernels_are_transposed_and_layers_are_in_order():
    params = random_params(SMALL)
    tensors = dict(export_tensors(t5_layout(SMALL), params))
    blocks = params["blocks"]
    np.testing.assert_array_equal(
        tensors["encoder.block.2.layer.1.DenseReluDense.wi_0.weight"], blocks["mlp_gate"]["kernel"][2].T
    )
    np.testing.assert_array_equal(
        tensors["encoder.block.1.layer.0.SelfAttention.o.weight"], blocks["out"]["kernel"][1].T
    )
    np.testing.assert_array_equal(tensors["encoder.block.0.layer.1.layer_norm.weight"], blocks["mlp_norm"]["scale"][0])


def test_the_second_copy_of_the_embedding_alone_is_ignored():
    def ignored(name):
        return any(re.fullmatch(pattern, name) for pattern in IGNORED)

    assert ignored("encoder.embed_tokens.weight")
    assert not any(map(ignored, PUBLISHED))


PUBLISHED_CONFIG = {
    "_name_or_path": "google/t5-v1_1-xxl", "architectures": ["T5EncoderModel"], "classifier_dropout": 0.0,
    "d_ff": 10240, "d_kv": 64, "d_model": 4096, "decoder_start_token_id": 0, "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1, "eos_token_id": 1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0,
    "is_encoder_decoder": True, "is_gated_act": True, "layer_norm_epsilon": 1e-06, "model_type": "t5",
    "num_decoder_layers": 24, "num_heads": 64, "num_layers": 24, "output_past": True, "pad_token_id": 0,
    "relative_attention_max_distance": 128, "relative_attention_num_buckets": 32, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32128,
}  # fmt: skip


def test_published_configs():
    assert config_from_transformers(Published(PUBLISHED_CONFIG)) == T5Config()
    older = {key: value for key, value in PUBLISHED_CONFIG.items() if key != "relative_attention_max_distance"}
    assert config_from_transformers(Published(older)) == T5Config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj is .relu.; must be .gated-gelu."),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05; must be 1e-06"),
    ],
)
def test_configs_of_other_models_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        config_from_transformers(Published({**PUBLISHED_CONFIG, **change}))


def test_a_missing_size_is_named():
    with pytest.raises(UserError, match=r"config.json: d_kv is missing"):
        config_from_transformers(Published({key: value for key, value in PUBLISHED_CONFIG.items() if key != "d_kv"}))
