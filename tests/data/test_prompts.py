"""Prompt files, good and bad, and the order of prompts."""

import pytest

from egrpo_jax.data.prompts import prompts_at, read_prompts
from egrpo_jax.errors import UserError


def test_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\n  ein Bär \nred heart".encode())
    assert read_prompts(str(path)) == ["a cat", "ein Bär", "red heart"]


def test_built_in_sets_do_not_overlap():
    train, heldout = read_prompts("emoji_train"), read_prompts("emoji_heldout")
    assert len(heldout) == 200
    assert len(train) > 1000
    assert not set(train) & set(heldout)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found no prompt"),
        (b" \n\n\t\n", "found no prompt"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "byte 0 is not UTF-8"),
        (b"cat\x00dog\n", "NUL byte"),
    ],
)
def test_files_without_prompts(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"prompt file .*prompts\.txt: .*{message}.*expected one prompt a line"):
        read_prompts(str(path))


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"No such file.*expected a text file, or one of emoji_train, emoji_heldout"):
        read_prompts(str(tmp_path / "nothing.txt"))
    with pytest.raises(UserError, match="Is a directory"):
        read_prompts(str(tmp_path))


def test_every_epoch_uses_every_prompt_once_in_another_order():
    prompts = [f"prompt {i}" for i in range(10)]
    order = prompts_at(prompts, seed=3, position=0, count=30)
    epochs = [order[:10], order[10:20], order[20:]]
    assert all(sorted(epoch) == sorted(prompts) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_seed_and_position_alone():
    prompts = [f"prompt {i}" for i in range(7)]
    whole = prompts_at(prompts, seed=1, position=0, count=20)
    assert prompts_at(prompts, seed=1, position=5, count=9) == whole[5:14]
    assert prompts_at(prompts, seed=2, position=0, count=20) != whole
