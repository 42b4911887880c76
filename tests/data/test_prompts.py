"""Prompt files, good and bad, and the order of prompts."""

import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.data.prompts import prompts_at, read_prompts


def test_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\n  ein Bär \nred heart".encode())
    assert read_prompts(str(path)) == ["a cat", "ein Bär", "red heart"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "a cat", "other": 1}\n\n"two, dogs"\n'),
        ("a.json", '["a cat", {"prompt": " two, dogs "}]'),
        ("a.csv", 'id,Prompt\n1,a cat\n2,"two, dogs"\n3\n'),
        ("a.TSV", "Prompt\tCategory\na cat\tx\ntwo, dogs\ty\n"),
    ],
)
def test_other_kinds_of_files(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert read_prompts(str(tmp_path / name)) == ["a cat", "two, dogs"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '"a"\n{"text": "b"}', r"entry 2 is .*; expected one JSON value a line: strings, or objects"),
        ("a.jsonl", '"a"\na cat', "line 2 is no JSON"),
        ("a.json", '{"prompt": "a"}', "found a dict, no list; expected a JSON list"),
        ("a.json", "[1]", "entry 1 is '1'"),
        ("a.csv", "text,id\na cat,1\n", r"found the columns \['text', 'id'\]; expected a table with a column 'prompt'"),
        ("a.csv", "", "found the columns"),
        ("a.csv", "prompt\n", "found no prompt"),
    ],
)
def test_other_kinds_of_files_that_are_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"^prompt file .*{name}: {message}"):
        read_prompts(str(tmp_path / name))


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
