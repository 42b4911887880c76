"""The tokenizers against transformers' own, run live, over vocabularies built by rule and over trained ones."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from egrpo_jax.text.tokenizers import load_clip_tokenizer, load_t5_tokenizer
from tests.oracle.tokenizers import (
    BOS,
    EOS,
    GOLDEN,
    KINDS,
    MARKED,
    PROMPTS,
    byte_letters,
    cases,
    published_clip_ids,
    published_t5_ids,
    settings,
    write_clip_files,
    write_settings,
    write_t5,
)

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CORPUS = [*PROMPTS[:-1], *("the quick brown fox jumps over the lazy dog and the cat's kittens 1234567890",) * 3]


@pytest.fixture
def trained_clip(tmp_path):
    """A byte-pair encoding trained on `CORPUS`, in CLIP's two files."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900, end_of_word_suffix="</w>", initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    ends = [f"{letter}</w>" for letter in byte_letters().values()]
    pieces = dict.fromkeys([*sorted(trained["vocab"], key=trained["vocab"].get), *ends, BOS, EOS])
    write_clip_files(tmp_path, {piece: number for number, piece in enumerate(pieces)}, trained["merges"])
    assert len(trained["merges"]) > 100
    return tmp_path


@pytest.fixture
def trained_pieces():
    """Pieces of a unigram model trained on `CORPUS`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["vocab"]]


def test_golden_file_is_up_to_date():
    with np.load(GOLDEN) as file:
        stored = dict(file)
    made = {f"{name}/ids": ids for name, ids in cases().items()}
    assert made.keys() == stored.keys()
    for key, ids in made.items():
        np.testing.assert_array_equal(ids, stored[key], err_msg=key)


def test_trained_clip_vocabulary(trained_clip):
    ids = load_clip_tokenizer(trained_clip)(PROMPTS)
    np.testing.assert_array_equal(ids, published_clip_ids(trained_clip))
    assert len(np.unique(ids)) > 60


def test_clip_as_transformers_saves_it(trained_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    transformers.CLIPTokenizer.from_pretrained(trained_clip).save_pretrained(folder)
    assert not (folder / "vocab.json").exists()
    np.testing.assert_array_equal(load_clip_tokenizer(folder)(PROMPTS), published_clip_ids(trained_clip))


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_of_a_trained_vocabulary(trained_clip, tmp_path_factory, kind):
    """In the published files, and in the one that transformers saves of them, alone and with theirs beside it."""
    files = settings(json.loads((trained_clip / "vocab.json").read_text("utf-8")))[kind]
    write_settings(trained_clip, *files)
    expected = published_clip_ids(trained_clip, MARKED)
    np.testing.assert_array_equal(load_clip_tokenizer(trained_clip)(MARKED), expected)
    saved = tmp_path_factory.mktemp("saved")
    transformers.CLIPTokenizer.from_pretrained(trained_clip).save_pretrained(saved)
    np.testing.assert_array_equal(load_clip_tokenizer(saved)(MARKED), published_clip_ids(saved, MARKED))
    np.testing.assert_array_equal(load_clip_tokenizer(saved)(MARKED), expected)
    write_settings(saved, *files)
    np.testing.assert_array_equal(load_clip_tokenizer(saved)(MARKED), published_clip_ids(saved, MARKED))


@pytest.mark.parametrize("length", [7, 64, 256])
def test_trained_t5_vocabulary(trained_pieces, tmp_path, length):
    write_t5(tmp_path, trained_pieces)
    ids = load_t5_tokenizer(tmp_path, length)(PROMPTS)
    np.testing.assert_array_equal(ids, published_t5_ids(tmp_path, length))
    assert len(np.unique(ids)) > 30 or length == 7


def test_t5_as_transformers_saves_it(trained_pieces, tmp_path):
    """Its own class, which builds normalisation and end token anew and adds 100 sentinels."""
    sentinels = [(f"<extra_id_{number}>", 0.0) for number in reversed(range(100))]
    published = transformers.T5Tokenizer(vocab=trained_pieces + sentinels)
    published.save_pretrained(tmp_path)
    expected = published(list(PROMPTS), padding="max_length", max_length=32, truncation=True).input_ids
    np.testing.assert_array_equal(load_t5_tokenizer(tmp_path, 32)(PROMPTS), expected)
