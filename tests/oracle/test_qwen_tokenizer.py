"""Qwen's tokenizer against transformers' classes, prompts to states against the pipelines of diffusers, run live."""

import shutil
import types

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, trainers

from egrpo_jax.models.qwen3 import Qwen3
from egrpo_jax.text.qwen import CHAT, CHAT_WITHOUT_THOUGHTS, load_qwen_tokenizer
from tests.models.test_qwen3 import random_params, relative_error
from tests.oracle.qwen3 import Case, published_config, published_model
from tests.oracle.qwen_tokenizer import (
    GOLDEN,
    NOT_SPECIAL,
    PROMPTS,
    SPECIAL,
    cases,
    published_tokenizer,
    published_tokens,
    write_qwen,
    write_settings,
)

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

CORPUS = [*PROMPTS[:-1], *("the quick brown fox jumps over the lazy dog and the cat's kittens\n\n1234567890\n",) * 3]
FORMS = {"klein": (CHAT_WITHOUT_THOUGHTS, False), "z_image": (CHAT, True)}
LENGTH = 48


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A byte-pair encoding trained on `CORPUS`, with Qwen's tokens added, in a folder as published."""
    folder = tmp_path_factory.mktemp("trained")
    write_qwen(folder, special=(), not_special=())
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, show_progress=False))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(list(NOT_SPECIAL))
    tokenizer.save(path)
    write_settings(folder)
    return folder


@pytest.fixture(scope="module")
def published(trained):
    return published_tokenizer(trained)


def test_golden_file_is_up_to_date():
    with np.load(GOLDEN) as file:
        stored = dict(file)
    made = cases()
    assert made.keys() == stored.keys()
    for key, array in made.items():
        np.testing.assert_array_equal(array, stored[key], err_msg=key)


@pytest.mark.parametrize("length", [9, 64, 512])
@pytest.mark.parametrize("form", FORMS)
def test_trained_vocabulary(trained, published, form, length):
    template, thinking = FORMS[form]
    ids, mask = load_qwen_tokenizer(trained, length, template).tokens(PROMPTS)
    expected = published_tokens(published, length, thinking)
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(mask, expected[1])
    assert len(np.unique(ids)) > 60 or length == 9


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_as_transformers_saves_it(trained, tmp_path, name):
    import transformers

    source, folder = (tmp_path / part for part in ("published", "saved"))
    shutil.copytree(trained, source)
    write_settings(source, name)
    saved = getattr(transformers, name).from_pretrained(source)
    saved.save_pretrained(folder)
    assert (folder / "chat_template.jinja").exists()
    ids, mask = load_qwen_tokenizer(folder, 64, CHAT).tokens(PROMPTS)
    for array, expected in zip((ids, mask), published_tokens(saved, 64, True), strict=True):
        np.testing.assert_array_equal(array, expected)


def small(tokenizer, layers):
    return Case(published_config(24, 5, 4, 2, 8, 40, len(tokenizer)), layers, LENGTH, ())


def our_states(case, folder, form):
    tokens = load_qwen_tokenizer(folder, LENGTH, FORMS[form][0]).tokens(PROMPTS)
    params = random_params(case.config, case.layers)
    return np.asarray(jax.jit(Qwen3(case.config, case.layers).apply)({"params": params}, *tokens)), tokens.mask


def test_prompts_to_states_as_diffusers_does_for_klein(trained, published):
    from diffusers import Flux2KleinPipeline

    case = small(published, (1, 2, 4))
    with torch.no_grad():
        expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            published_model(case, attention="sdpa"), published, list(PROMPTS), max_sequence_length=LENGTH,
            hidden_states_layers=list(case.layers),
        )  # fmt: skip
    assert relative_error(our_states(case, trained, "klein")[0], expected.numpy()) <= 1e-5


def test_prompts_to_states_as_diffusers_does_for_z_image(trained, published):
    from diffusers import ZImagePipeline

    case = small(published, (4,))  # the last but one, as 35 of 36
    parts = types.SimpleNamespace(
        tokenizer=published, text_encoder=published_model(case, attention="sdpa"), _execution_device="cpu"
    )
    with torch.no_grad():
        expected = ZImagePipeline._encode_prompt(parts, list(PROMPTS), max_sequence_length=LENGTH)
    states, mask = our_states(case, trained, "z_image")
    for row, tensor in enumerate(expected):
        assert relative_error(states[row][mask[row]], tensor.numpy()) <= 1e-5
