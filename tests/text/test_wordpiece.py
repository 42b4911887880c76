"""WordPiece against the ids that ImageReward's own tokenizer makes; vocabularies of other models refused."""

import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.text.wordpiece import load_wordpiece
from tests.models.test_blip import golden
from tests.oracle.imagereward import PROMPTS, vocabulary, write_vocabulary

SIZE = len(vocabulary()) + 2


@pytest.fixture
def folder(tmp_path):
    write_vocabulary(tmp_path / "vocab.txt")
    return tmp_path


@pytest.mark.parametrize("as_folder", [True, False])
def test_ids_and_mask_are_the_published_ones(folder, as_folder):
    tokens = load_wordpiece(folder if as_folder else folder / "vocab.txt", 35, SIZE)(PROMPTS)
    assert (tokens.ids.dtype, tokens.mask.dtype) == (np.int32, bool)
    for row, prompt in enumerate(PROMPTS):
        np.testing.assert_array_equal(tokens.ids[row], golden("patch_16")["ids"][row], err_msg=prompt)
        np.testing.assert_array_equal(tokens.mask[row], golden("patch_16")["mask"][row], err_msg=prompt)


def test_ids_by_hand(folder):
    words = vocabulary()
    tokens = load_wordpiece(folder, 8, SIZE)(["Two CATS!", "naïve [ENC] 🐱", ""])
    spelled = [[[*words, "[DEC]", "[ENC]"][number] for number in row] for row in tokens.ids]
    assert spelled == [
        ["[CLS]", "two", "cat", "##s", "!", "[SEP]", "[PAD]", "[PAD]"],
        ["[CLS]", "naive", "[ENC]", "[UNK]", "[SEP]", "[PAD]", "[PAD]", "[PAD]"],
        ["[CLS]", "[SEP]", *["[PAD]"] * 6],
    ]
    np.testing.assert_array_equal(tokens.mask.sum(1), [6, 5, 2])


def test_long_texts_are_cut_and_keep_their_end(folder):
    tokens = load_wordpiece(folder, 5, SIZE)(["a photo of a cat and the dog"])
    assert [vocabulary()[number] for number in tokens.ids[0]] == ["[CLS]", "a", "photo", "of", "[SEP]"]
    assert tokens.mask.all()


def test_no_texts(folder):
    tokens = load_wordpiece(folder, 5, SIZE)([])
    assert tokens.ids.shape == tokens.mask.shape == (0, 5)


def test_files_that_will_not_do(folder):
    with pytest.raises(UserError, match=rf"vocab\.txt has {SIZE - 2} tokens; give the vocab.* with {SIZE - 1}$"):
        load_wordpiece(folder, 35, SIZE + 1)
    (folder / "vocab.txt").write_text("\n".join(["the", "[PAD]", "[UNK]"]))
    with pytest.raises(
        UserError, match=r"has 3 tokens and lacks \[CLS\], \[SEP\], \[MASK\]; give the vocab\.txt of be"
    ):
        load_wordpiece(folder, 35, 5)
    (folder / "vocab.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"^cannot read \S+vocab\.txt \([^\n]+\); download it again$"):
        load_wordpiece(folder, 35, 5)
    (folder / "vocab.txt").unlink()
    with pytest.raises(
        UserError, match=r"vocab\.txt is missing; give the folder of BERT's tokenizer, or its vocab\.txt"
    ):
        load_wordpiece(folder, 35, SIZE)


def test_a_token_that_is_there_twice(folder):
    path = folder / "vocab.txt"
    lines = path.read_text("utf-8").rstrip("\n").split("\n")
    path.write_text("\n".join([*lines[:-1], lines[-2]]) + "\n", "utf-8")
    with pytest.raises(UserError, match=rf"vocab\.txt has {SIZE - 3} tokens; give the vocab"):
        load_wordpiece(folder, 35, SIZE)
