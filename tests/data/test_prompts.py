"""Prompt files, good and bad, the order of prompts and their hash."""

import csv
import hashlib
import json

import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.data.prompts import prompts_at, prompts_hash, read_prompts
from egrpo_jax.evaluation.side_by_side import score_lines
from egrpo_jax.rewards import Scores


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


def read(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(str(path))


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        (
            "a.txt",
            "a\x0bfox\r\na\x0ccat\na\x85dog\u2028sleeps\na\rb\n",
            ["a\x0bfox", "a\x0ccat", "a\x85dog\u2028sleeps", "a\rb"],
        ),
        ("a.jsonl", '{"prompt":"a fox\u2028jumps"}\r\n"a\\ncat"\n', ["a fox\u2028jumps", "a\ncat"]),
        ("a.tsv", "Prompt\tChallenge\r\na fox\u2028jumps\tx\r\n", ["a fox\u2028jumps"]),
        ("a.csv", 'prompt\na fox\u2028jumps\n"a cat\nand, a dog"\n', ["a fox\u2028jumps", "a cat\nand, a dog"]),
    ],
)
def test_a_record_ends_at_a_line_feed_only(tmp_path, name, content, prompts):
    assert read(tmp_path, name, content) == prompts


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ('"S T O P" in tall letters\tx\n""\ty', ['"S T O P" in tall letters', '""']),
        ('"open quote never closed\tA\nsecond\tB\nthird\tC\n', ['"open quote never closed', "second", "third"]),
        ("\t\n\n\na cat\t", ["a cat"]),
    ],
)
def test_a_quote_is_text_in_a_tsv(tmp_path, content, prompts):
    assert read(tmp_path, "a.tsv", "Prompt\tCategory\n" + content) == prompts


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'Prompts,Category\n"a sign ""Hi"", ok",Text\n'),
        ("a.csv", '\nid, PROMPT \n1, "a sign ""Hi"", ok"\n'),
        ("a.tsv", 'prompts\na sign "Hi", ok'),
        ("a.json", r'[{"Prompts": "a sign \"Hi\", ok"}]'),
    ],
)
def test_names_of_the_column(tmp_path, name, content):
    assert read(tmp_path, name, content) == ['a sign "Hi", ok']


def test_invisible_prompts_do_not_count(tmp_path):
    empty = ["\u200b", "\ufeff", "\xa0", "\u3164 \u2800", "\ufe0f", "\x1b", "\u202e\u2029"]
    assert read(tmp_path, "a.txt", "\n".join(["a fox\u200b", *empty, "\u00ad", "❤\ufe0f", "\ue000"])) == [
        "a fox\u200b",
        "❤\ufe0f",
        "\ue000",  # a font's own symbol
    ]
    assert read(tmp_path, "a.jsonl", '\u200b\n{"prompt": "\\u200b"}\n"a"\n') == ["a"]
    with pytest.raises(UserError, match="found no prompt"):
        read(tmp_path, "a.txt", "\n".join(empty))


def test_files_with_byte_order_marks_one_after_the_other(tmp_path):
    assert read(tmp_path, "a.txt", "\ufeffa cat\n\ufeffa dog\n") == ["a cat", "a dog"]
    assert read(tmp_path, "a.jsonl", '\ufeff"a cat"\n\ufeff"a dog"\n') == ["a cat", "a dog"]
    assert read(tmp_path, "a.csv", "\ufeffprompt\na cat\n") == ["a cat"]


def test_long_and_large_values_beside_the_prompt(tmp_path):
    limit = csv.field_size_limit()
    image, number = "x" * (limit + 1), "1" * 5000
    assert read(tmp_path, "a.csv", f"image,prompt\n{image},{image}\n") == [image]
    assert read(tmp_path, "a.tsv", f"image\tprompt\n{image}\t{image}\n") == [image]
    line = f'{{"prompt": "a", "id": {number}, "score": NaN, "nested": {"[" * 50}{"]" * 50}}}'
    assert read(tmp_path, "a.jsonl", line) == ["a"]
    assert read(tmp_path, "a.json", f"[{line}]") == ["a"]


@pytest.mark.parametrize("samples", [1, 3])
def test_scores_of_an_evaluation_give_its_prompts(tmp_path, samples):
    prompts = ["a fox\u2028jumps", "a cat", "a cat", "a dog\nsleeps", "a cat"]
    scores = {"hps": Scores.of(np.full((5, samples), np.nan))}
    assert read(tmp_path, "scores.jsonl", score_lines(prompts, [scores, scores])) == prompts


def test_repeated_prompts_count_and_samples_of_other_files_are_no_matter(tmp_path):
    lines = [{"prompt": prompt, "sample": sample} for prompt, sample in [("a", 7), ("b", 8), ("b", 8), ("b", "9")]]
    assert read(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines))) == ["a", "b", "b", "b"]
    assert read(tmp_path, "a.txt", "a\na\n") == ["a", "a"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '"a"\n{"text": "b"}',
            r"line 2 is {'text': 'b'}; expected one JSON value a line: strings, or objects",
        ),
        ("a.jsonl", '"a"\na cat', "line 2 is no JSON"),
        ("a.jsonl", '"a"\n\n"b" "c"', "line 3 is no JSON"),
        ("a.jsonl", '"a"\n["b"]', r"line 2 is \['b'\]"),
        ("a.jsonl", '"a"\nNaN', "line 2 is nan"),
        ("a.jsonl", '"a"\n{"prompt": null}', r"line 2 is {'prompt': None}"),
        ("a.jsonl", '"a"\n"\\ud83e fox"', r"line 2 has half a character, \\ud83e, in its prompt"),
        ("a.jsonl", '"a"\n"fox \\udd8a"', r"line 2 has half a character, \\udd8a, in its prompt"),
        ("a.jsonl", '"a"\n"a\\u0000b"', "line 2 has NUL in its prompt"),
        ("a.jsonl", '"a"\n{"prompt": "b", "prompt": "c"}', "line 2 has an object with two fields 'prompt'"),
        ("a.jsonl", '"a"\n{"prompt": "b", "Prompt": "c"}', "line 2 has 2 fields of prompts: 'prompt', 'Prompt'"),
        ("a.json", '{"prompt": "a"}', "found a dict, no list; expected a JSON list"),
        ("a.json", "", "line 1 is no JSON"),
        ("a.json", "[]", "found no prompt"),
        ("a.json", "[1]", "entry 1 is 1"),
        ("a.json", '["a", ["b"]]', r"entry 2 is \['b'\]"),
        ("a.json", '["a",\n"b\n"]', "line 2 is no JSON"),
        ("a.json", r'["a", {"prompt": "a \ud83e fox"}]', r"entry 2 has half a character, \\ud83e, in its prompt"),
        ("a.json", '[{"prompt": "a", "prompt": "b"}]', "the file has an object with two fields 'prompt'"),
        ("a.csv", "text,id\na cat,1\n", r"found the columns \['text', 'id'\]; expected a table with a column 'prompt'"),
        ("a.csv", "prompt,Prompts\na,b\n", "the header has 2 fields of prompts: 'prompt', 'Prompts'"),
        ("a.csv", "", "found the columns"),
        ("a.csv", "prompt\n", "found no prompt"),
        (
            "a.csv",
            "id,prompt\n0,cat\n1,a fox, running\n",
            "the row at line 3 has 3 fields, the header 2; .* within double",
        ),
        ("a.csv", 'prompt\n"two\nlines"\na fox, running\n', "the row at line 4 has 2 fields, the header 1"),
        ("a.csv", 'prompt,id\na,1\n"b,2\nc,3\n', r"the row at line 3 is no CSV \(unexpected end of data\)"),
        ("a.csv", 'prompt,id\n"STOP" on a sign,1\n', r"the row at line 2 is no CSV \(',' expected after '\"'\)"),
        ("a.csv", "prompt,id\na\rb,1\n", "the row at line 2 is no CSV"),
        ("a.tsv", "prompt\tid\na\tb\tc\n", "the row at line 2 has 3 fields, the header 2; .* single tabs"),
        ("a.tsv", "text\na cat\n", r"found the columns \['text'\]"),
    ],
)
def test_other_kinds_of_files_that_are_wrong(tmp_path, name, content, message):
    with pytest.raises(UserError, match=rf"^prompt file .*{name}: {message}"):
        read(tmp_path, name, content)


def test_values_too_deep_or_large_for_a_prompt(tmp_path):
    for name, place in [("a.jsonl", "line 1"), ("a.json", "the file")]:
        with pytest.raises(UserError, match=f"{place} is nested too deeply"):
            read(tmp_path, name, "[" * 100_000)
    with pytest.raises(UserError, match="line 1 is inf"):
        read(tmp_path, "a.jsonl", "1" * 5000)


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
        (b"\x89PNG\r\n\x1a\n\x00\x00", "line 1: byte 0 is not UTF-8"),
        (b"a cat\nB\xe4r\n", "line 2: byte 7 is not UTF-8"),
        ("a cat".encode("utf-16"), "line 1: byte 0 is not UTF-8, but looks like UTF-16"),
        (b"a cat\ncat\x00dog\n", "line 2: found a NUL byte"),
    ],
)
def test_files_without_prompts(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"prompt file .*prompts\.txt: {message}.*expected one prompt a line"):
        read(tmp_path, "prompts.txt", content)


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


def test_hash_is_that_of_a_text_file_and_tells_lists_apart():
    assert prompts_hash(["one", "zwölf"]) == hashlib.sha256("one\nzwölf\n".encode()).hexdigest()
    lists = [["a\nb"], ["a", "b"], ["a\n", "b"], ["a", "\nb"], ["a\nb", ""], ["b", "a"], ["a", "c"], ["a"], []]
    assert len({prompts_hash(prompts) for prompts in lists}) == len(lists)
