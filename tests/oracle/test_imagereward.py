"""ImageReward's model and tokenizer against transformers' BLIP and BERT, run live; its own code needs an old one."""

import json

import numpy as np
import pytest

from egrpo_jax.models.blip import SCORE_MEAN, SCORE_STD, forward_flops
from egrpo_jax.text.wordpiece import load_wordpiece
from tests.models.test_blip import golden, model
from tests.oracle.imagereward import CASES, PROMPTS, network_inputs, vocabulary, write_vocabulary
from tests.oracle.random_weights import random_tensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

RENAMED = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("blocks", "encoder.layers"),
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
    ("attn.qkv", "self_attn.qkv"),
    ("attn.proj", "self_attn.projection"),
)
"""Published names in the vision transformer, and transformers'."""


def published(name, prefix):
    """The tensors of a case under a prefix, which is taken off."""
    shapes = {key: shape for key, shape in json.loads(str(golden(name)["shapes"])).items() if key.startswith(prefix)}
    shapes.pop("blip.text_encoder.embeddings.position_ids", None)
    return {key.removeprefix(prefix): torch.from_numpy(array) for key, array in random_tensors(shapes).items()}


def vision_tower(name):
    config = CASES[name].config
    tower = transformers.BlipVisionModel(
        transformers.BlipVisionConfig(
            hidden_size=config.vision.width, intermediate_size=config.vision.mlp_dim, image_size=config.image_size,
            num_hidden_layers=config.vision.num_layers, num_attention_heads=config.vision.num_heads,
            patch_size=config.patch_size, layer_norm_eps=1e-6, hidden_act="gelu", attn_implementation="eager",
        )
    )  # fmt: skip
    tensors = {}
    for key, tensor in published(name, "blip.visual_encoder.").items():
        for ours, theirs in RENAMED:
            key = key.replace(ours, theirs)
        tensors[key if key.startswith(("embeddings", "encoder")) else f"post_layer{key}"] = tensor
    tower.load_state_dict(tensors, strict=True)
    return tower.eval()


def text_encoder(name):
    config = CASES[name].config
    encoder = transformers.models.blip.modeling_blip_text.BlipTextModel(
        transformers.BlipTextConfig(
            vocab_size=config.vocab_size, hidden_size=config.text.width, encoder_hidden_size=config.vision.width,
            intermediate_size=config.text.mlp_dim, num_hidden_layers=config.text.num_layers,
            num_attention_heads=config.text.num_heads, max_position_embeddings=config.length, layer_norm_eps=1e-12,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    encoder.load_state_dict(published(name, "blip.text_encoder."), strict=True)
    return encoder.eval()


def live_scores(name):
    pixels, ids, mask = network_inputs()
    with torch.no_grad():
        states = vision_tower(name)(torch.from_numpy(pixels).permute(0, 3, 1, 2)).last_hidden_state
        words = text_encoder(name)(
            torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask).long(), encoder_hidden_states=states
        )
        x = words.last_hidden_state[:, 0]
        head = published(name, "mlp.layers.")
        for place in (0, 2, 4, 6, 7):
            x = torch.nn.functional.linear(x, head[f"{place}.weight"], head[f"{place}.bias"])
    return (x[:, 0].numpy() - SCORE_MEAN) / SCORE_STD


@pytest.mark.parametrize("name", CASES)
def test_scores(name):
    expected = live_scores(name)
    np.testing.assert_allclose(model(CASES[name].config)(*network_inputs()), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(golden(name)["network"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_operations_as_torch_counts_them(name):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        live_scores(name)
    _, ids, _ = network_inputs()
    assert counter.get_total_flops() == len(ids) * forward_flops(CASES[name].config, ids.shape[1])


@pytest.mark.parametrize("length", [7, 35, 64])
def test_tokens(tmp_path, length):
    write_vocabulary(tmp_path / "vocab.txt")
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    encoded = tokenizer(list(PROMPTS), padding="max_length", truncation=True, max_length=length)
    tokens = load_wordpiece(tmp_path, length, len(vocabulary()) + 2)(PROMPTS)
    np.testing.assert_array_equal(tokens.ids, encoded.input_ids)
    np.testing.assert_array_equal(tokens.mask, np.array(encoded.attention_mask, bool))
