"""Qwen's tokens against those of transformers with a chat template (golden file), and folders that are not right."""

import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer

from egrpo_jax.common.errors import UserError
from egrpo_jax.text.qwen import CHAT, CHAT_WITHOUT_THOUGHTS, load_qwen_tokenizer
from egrpo_jax.text.tokenizers import check_vocabulary
from egrpo_jax.weights.configs import Published
from tests.oracle.qwen_tokenizer import GOLDEN, LENGTHS, NOT_SPECIAL, PROMPTS, SPECIAL, write_qwen, write_settings

TEMPLATES = {"klein": CHAT_WITHOUT_THOUGHTS, "z_image": CHAT}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    write_qwen(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    shutil.copy(written / "tokenizer.json", tmp_path)
    return tmp_path


def vocabulary(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_the_published_ones(written, name, length):
    ids, mask = load_qwen_tokenizer(written, length, TEMPLATES[name]).tokens(PROMPTS)
    with np.load(GOLDEN) as file:
        np.testing.assert_array_equal(ids, file[f"{name}_{length}/ids"])
        np.testing.assert_array_equal(mask, file[f"{name}_{length}/mask"])
    assert (ids.dtype, mask.dtype) == (np.int32, bool)


def expected_ids(folder, *pieces):
    known = vocabulary(folder)
    return [known[piece] for piece in pieces]


def test_tokens_by_hand(written):
    start = ["<|im_start|>", *"user", "Ċ"]
    end = ["<|im_end|>", "Ċ", "<|im_start|>", *"assist", "an", "t", "Ċ"]
    thoughts = ["<think>", "Ċ", "Ċ", "</think>", "Ċ", "Ċ"]
    for template, last in ((CHAT, []), (CHAT_WITHOUT_THOUGHTS, thoughts)):
        ids, mask = load_qwen_tokenizer(written, 40, template).tokens(["the cat", ""])
        for row, prompt in enumerate((["the", "Ġcat"], [])):
            expected = expected_ids(written, *start, *prompt, *end, *last)
            pad = expected_ids(written, "<|endoftext|>")
            np.testing.assert_array_equal(ids[row], expected + pad * (40 - len(expected)))
            np.testing.assert_array_equal(mask[row], np.arange(40) < len(expected))


def test_a_long_prompt_loses_the_end_of_its_form(written):
    ids, mask = load_qwen_tokenizer(written, 32, CHAT_WITHOUT_THOUGHTS).tokens(["the" + " the" * 2000])
    start = expected_ids(written, "<|im_start|>", *"user", "Ċ", "the")
    np.testing.assert_array_equal(ids[0], start + expected_ids(written, "Ġthe") * (32 - len(start)))
    assert mask.all()


def test_a_pad_token_that_a_prompt_spells_is_no_padding(written):
    (ids,), (mask,) = load_qwen_tokenizer(written, 40, CHAT).tokens(["<|endoftext|>the"])
    pad = expected_ids(written, "<|endoftext|>")[0]
    assert ids[6] == pad
    assert mask[6]
    assert (ids[~mask] == pad).all()


def test_templates_in_the_folder_are_not_run(folder):
    write_settings(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    settings |= {"chat_template": "{{ messages[0].content | upper }}", "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}", "utf-8")
    ids = load_qwen_tokenizer(folder, 64, CHAT)(PROMPTS)
    with np.load(GOLDEN) as file:
        np.testing.assert_array_equal(ids, file["z_image_64/ids"])


def test_settings_of_length_in_the_file_count_for_nothing(folder):
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(9, direction="left")
    tokenizer.enable_padding(direction="left", length=10)
    tokenizer.save(str(path))
    ids, mask = load_qwen_tokenizer(folder, 64, CHAT).tokens(PROMPTS)
    with np.load(GOLDEN) as file:
        np.testing.assert_array_equal(ids, file["z_image_64/ids"])
        np.testing.assert_array_equal(mask, file["z_image_64/mask"])


def test_no_prompts_give_no_rows(written):
    tokens = load_qwen_tokenizer(written, 12, CHAT).tokens([])
    assert tokens.ids.shape == tokens.mask.shape == (0, 12)


@pytest.mark.parametrize("token", [*SPECIAL, *NOT_SPECIAL])
def test_special_tokens_that_are_missing_are_named(tmp_path, token):
    left = [[name for name in names if name != token] for names in (SPECIAL, NOT_SPECIAL)]
    write_qwen(tmp_path, *left)
    with pytest.raises(UserError, match=r"tokenizer\.json has no token <.*>; is it .* another model's") as caught:
        load_qwen_tokenizer(tmp_path, 12, CHAT_WITHOUT_THOUGHTS)
    assert f" {token};" in str(caught.value)
    if token in NOT_SPECIAL:
        load_qwen_tokenizer(tmp_path, 12, CHAT)


def test_special_tokens_that_are_not_read_as_such(folder):
    """They are in the vocabulary, but not among the tokens that are looked for in a text."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    for added in content["added_tokens"]:
        content["model"]["vocab"][added["content"]] = added["id"]
    path.write_text(json.dumps(content | {"added_tokens": []}), "utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json makes \[.*\] of <\|endoftext\|>; must be \[\d+\]: give"):
        load_qwen_tokenizer(folder, 12, CHAT)


def test_files_that_are_not_right(folder):
    path = folder / "tokenizer.json"
    whole = path.read_text("utf-8")
    path.write_text(whole[: len(whole) // 2], "utf-8")
    with pytest.raises(UserError, match=r"cannot read .*tokenizer.json \(.*\); download the folder again"):
        load_qwen_tokenizer(folder, 16, CHAT)
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is missing; "):
        load_qwen_tokenizer(folder, 16, CHAT)


def test_ids_beyond_the_model(written):
    tokenizer = load_qwen_tokenizer(written, 16, CHAT)
    assert tokenizer.last_id == max(vocabulary(written).values()) == vocabulary(written)["</think>"]
    check_vocabulary(Published({}), tokenizer.last_id + 1, tokenizer)
    with pytest.raises(UserError, match=rf"vocab_size is 7; must be above {tokenizer.last_id}"):
        check_vocabulary(Published({"vocab_size": 7}), 7, tokenizer)
