import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.data.emoji import all_names
from egrpo_jax.text.emoji import LENGTH, load_tokenizer, tokenize, train_tokenizer


def test_ids_are_padded_and_cut_to_the_length():
    ids = tokenize(["cat", "", "one two three four five six seven eight nine ten"])
    assert ids.shape == (3, LENGTH)
    assert ids.dtype == np.int32
    assert (ids[0] != 0).sum() == 1
    assert (ids[1] == 0).all()
    assert (ids[2] != 0).all()


def test_case_accents_and_punctuation_do_not_matter():
    ids = tokenize(["Green CAT!", "  green, cat", "piñata", "pinata"])
    np.testing.assert_array_equal(ids[0], ids[1])
    np.testing.assert_array_equal(ids[2], ids[3])


def test_every_name_has_its_own_ids():
    ids = tokenize(all_names())
    assert len({tuple(row) for row in ids.tolist()}) == len(all_names())


def test_words_of_names_are_whole_and_unknown_words_fall_to_pieces():
    tokenizer = load_tokenizer()
    assert tokenizer.encode("red heart").tokens[:3] == ["red", "heart", "[PAD]"]
    pieces = [token for token in tokenizer.encode("zqxjkv").tokens if token != "[PAD]"]
    assert len(pieces) > 1
    assert "[UNK]" not in pieces
    assert tokenizer.encode("日本").tokens[0] == "[UNK]"


def test_training_is_deterministic_and_keeps_whole_words():
    words = ["red heart", "blue heart", "keycap #"]
    first, second = train_tokenizer(words), train_tokenizer(reversed(words))
    assert first.to_str() == second.to_str()
    assert first.encode("Heart").tokens[0] == "heart"
    assert tokenize(["keycap #"], first)[0, 1] != 0


def test_missing_or_damaged_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.json"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"bad\.json"):
        load_tokenizer(tmp_path / "bad.json")
