"""Token ids against those of the published tokenizers (golden files), and folders that are not right."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from egrpo_jax.common.errors import UserError
from egrpo_jax.models.clip import ClipTextConfig
from egrpo_jax.text.tokenizers import (
    _clip_from_merges,
    check_clip_ids,
    load_clip_tokenizer,
    load_open_clip_tokenizer,
    load_t5_tokenizer,
)
from egrpo_jax.weights.configs import Published
from tests.oracle import open_clip
from tests.oracle.scored_images import TEXTS
from tests.oracle.tokenizers import (
    BOS,
    EOS,
    GOLDEN,
    KINDS,
    MARKED,
    PROMPTS,
    T5_LENGTHS,
    t5_pieces,
    write_clip,
    write_marked_clip,
    write_t5,
)


def golden(name):
    with np.load(GOLDEN) as file:
        return file[f"{name}/ids"]


@pytest.fixture
def clip_folder(tmp_path):
    write_clip(tmp_path)
    return tmp_path


@pytest.fixture
def t5_folder(tmp_path):
    write_t5(tmp_path)
    return tmp_path


def clip_ids(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
    return vocabulary, vocabulary[BOS], vocabulary[EOS]


def test_clip_ids_are_the_published_ones(clip_folder):
    ids = load_clip_tokenizer(clip_folder)(PROMPTS)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, golden("clip"))


def test_clip_ids_by_hand(clip_folder):
    vocabulary, bos, eos = clip_ids(clip_folder)
    ids = load_clip_tokenizer(clip_folder)(["Photo of the  CAT7!", ""])
    pieces = ["photo</w>", "of</w>", "the</w>", "cat</w>", "7</w>", "!</w>"]
    np.testing.assert_array_equal(ids[0], [bos, *(vocabulary[piece] for piece in pieces), *[eos] * 70])
    np.testing.assert_array_equal(ids[1], [bos, *[eos] * 76])


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_those_that_the_folder_names(tmp_path, kind):
    write_marked_clip(tmp_path, kind)
    np.testing.assert_array_equal(load_clip_tokenizer(tmp_path)(MARKED), golden(f"clip {kind}"))


def end_id(tokenizer):
    """The last id of a prompt, before the padding."""
    ids, mask = tokenizer.tokens([""])
    return ids[mask][-1]


def test_padding_that_is_a_word_by_hand(tmp_path):
    """The tokenizers of SD3.5: in the second every "!" is padding, wherever it stands."""
    write_marked_clip(tmp_path, "first")
    vocabulary, bos, eos = clip_ids(tmp_path)
    assert vocabulary["!"] == 0
    cat, bang = vocabulary["cat</w>"], vocabulary["!</w>"]
    first = load_clip_tokenizer(tmp_path)
    assert (first.pad_id, end_id(first)) == (eos, eos)
    np.testing.assert_array_equal(first(["Cat!", ""]), [[bos, cat, bang, *[eos] * 74], [bos, *[eos] * 76]])
    write_marked_clip(tmp_path, "second")
    second = load_clip_tokenizer(tmp_path)
    assert (second.pad_id, end_id(second), second.last_id) == (0, eos, eos)
    expected = [[bos, cat, 0, eos, *[0] * 73], [bos, 0, 0, 0, eos, *[0] * 72], [bos, eos, *[0] * 75]]
    np.testing.assert_array_equal(second(["Cat!", "!!!", ""]), expected)


def test_the_end_of_a_prompt_need_not_be_its_padding(tmp_path):
    """The pooled state of a text encoder is at its end, by the highest id or by its own."""
    write_marked_clip(tmp_path, "second")
    tokenizer = load_clip_tokenizer(tmp_path)
    config = ClipTextConfig(vocab_size=tokenizer.last_id + 1)
    for eos_id in (None, end_id(tokenizer)):
        check_clip_ids(Published({}), dataclasses.replace(config, eos_id=eos_id), tokenizer)
    with pytest.raises(UserError, match=rf"eos_token_id is 0; must be {end_id(tokenizer)}, with which its tokenizer"):
        check_clip_ids(Published({"eos_token_id": 0}), dataclasses.replace(config, eos_id=0), tokenizer)


def test_padding_above_the_end_hides_it(clip_folder):
    """A token that the vocabulary does not have gets the next id, for which a model has no embedding."""
    eos = clip_ids(clip_folder)[2]
    (clip_folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    tokenizer = load_clip_tokenizer(clip_folder)
    assert (tokenizer.pad_id, end_id(tokenizer), tokenizer.last_id) == (eos + 1, eos, eos + 1)
    with pytest.raises(UserError, match=rf"vocab_size is missing; must be above {eos + 1}"):
        check_clip_ids(Published({}), ClipTextConfig(vocab_size=eos + 1), tokenizer)
    with pytest.raises(UserError, match=rf"eos_token_id is missing; must be {eos}, with which its tokenizer ends"):
        check_clip_ids(Published({}), ClipTextConfig(vocab_size=eos + 2), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("special_tokens_map.json", {"pad_token": 0}, "pad_token is 0; must be a token, or an object with its content"),
        ("tokenizer_config.json", {"pad_token": ""}, 'pad_token is ""; must be a token'),
        ("tokenizer_config.json", {"eos_token": {"content": "a", "lstrip": 1}}, "eos_token is .*; must be a token"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "a"}}},
            "added_tokens_decoder is .*; ",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"0": "!"}},
            "added_tokens_decoder is .*; must be an object",
        ),
        ("special_tokens_map.json", [1], "holds a JSON list; must be an object"),
    ],
)
def test_special_tokens_that_are_none(clip_folder, name, content, message):
    (clip_folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{name}:? {message}"):
        load_clip_tokenizer(clip_folder)


def test_a_long_clip_prompt_keeps_75_tokens_and_its_ends(clip_folder):
    vocabulary, bos, eos = clip_ids(clip_folder)
    ids = load_clip_tokenizer(clip_folder)(["cat " * 200])[0]
    np.testing.assert_array_equal(ids, [bos, *[vocabulary["cat</w>"]] * 75, eos])


def test_clip_from_tokenizer_json_alone(clip_folder, tmp_path_factory):
    """As transformers 5 saves it: settings of length in the file count for nothing."""
    whole = _clip_from_merges(clip_folder / "vocab.json", clip_folder / "merges.txt")
    whole.enable_truncation(9)
    folder = tmp_path_factory.mktemp("whole")
    whole.save(str(folder / "tokenizer.json"))
    np.testing.assert_array_equal(load_clip_tokenizer(folder)(PROMPTS), golden("clip"))


def up_to_the_end(ids):
    """Without padding, which open_clip does with another token: no feature depends on it."""
    return [list(row[: list(row).index(ids.max()) + 1]) for row in ids]


def test_open_clip_ids_are_the_published_ones(clip_folder):
    with np.load(open_clip.GOLDEN) as file:
        expected = file["tokens/ids"]
    ids = load_open_clip_tokenizer(clip_folder)(TEXTS)
    assert ids.shape == (len(TEXTS), 77)
    assert up_to_the_end(ids) == up_to_the_end(expected)
    mended = [row for row, text in enumerate(TEXTS) if (load_clip_tokenizer(clip_folder)([text]) != ids[row]).any()]
    assert len(mended) >= 4
    assert mended[0] > 0


def test_open_clip_texts_by_hand(clip_folder):
    """Entities are resolved twice, broken encodings and ligatures mended; special tokens are text."""
    ids = load_open_clip_tokenizer(clip_folder)
    np.testing.assert_array_equal(ids(["the  &amp;lt; CAT\n"]), ids(["the < cat"]))
    np.testing.assert_array_equal(ids(["the dogâ€™s"]), ids(["the dog's"]))
    eos = clip_ids(clip_folder)[2]
    for text in (EOS, "<end_of_text>"):
        row = list(ids([f"the cat {text} of"])[0])
        assert row.index(eos) > 6, text


def test_open_clip_from_tokenizer_json_alone(clip_folder, tmp_path_factory):
    whole = _clip_from_merges(clip_folder / "vocab.json", clip_folder / "merges.txt")
    folder = tmp_path_factory.mktemp("whole")
    whole.save(str(folder / "tokenizer.json"))
    np.testing.assert_array_equal(load_open_clip_tokenizer(folder)(TEXTS), load_open_clip_tokenizer(clip_folder)(TEXTS))


@pytest.mark.parametrize("length", T5_LENGTHS)
def test_t5_ids_are_the_published_ones(t5_folder, length):
    ids = load_t5_tokenizer(t5_folder, length)(PROMPTS)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, golden(f"t5_{length}"))


def test_t5_ids_by_hand(t5_folder):
    places = {piece: place for place, (piece, _) in enumerate(t5_pieces())}
    ids = load_t5_tokenizer(t5_folder, 6)(["photo of the cat", "", "the " * 50, "🚀"])
    words = [places[f"▁{word}"] for word in ("photo", "of", "the", "cat")]
    np.testing.assert_array_equal(ids[0], [*words, 1, 0])
    np.testing.assert_array_equal(ids[1], [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(ids[2], [*[places["▁the"]] * 5, 1])
    np.testing.assert_array_equal(ids[3], [places["▁"], 2, 1, 0, 0, 0])


def test_no_prompts_give_no_rows(tmp_path_factory):
    clip, t5 = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("t5")
    write_clip(clip)
    write_t5(t5)
    assert load_clip_tokenizer(clip)([]).shape == (0, 77)
    assert load_t5_tokenizer(t5, 12)([]).shape == (0, 12)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_a_missing_clip_file_is_named(clip_folder, name):
    (clip_folder / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is missing; .*folder"):
        load_clip_tokenizer(clip_folder)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("damage", [b'{"a": ', b"\xff\xfe\x00", b"#version: 0.2\nnever seen\n"])
def test_a_damaged_clip_file_is_one_line(clip_folder, name, damage):
    (clip_folder / name).write_bytes(damage)
    with pytest.raises(UserError, match=f"cannot read .*{name}.* download the folder again") as caught:
        load_clip_tokenizer(clip_folder)
    assert "\n" not in str(caught.value)


def test_a_vocabulary_without_special_tokens_is_refused(clip_folder):
    vocabulary = clip_ids(clip_folder)[0]
    (clip_folder / "vocab.json").write_text(json.dumps({k: v for k, v in vocabulary.items() if k != BOS}), "utf-8")
    with pytest.raises(UserError, match=r"vocab.json has no token <\|startoftext\|>; .*another model"):
        load_clip_tokenizer(clip_folder)


def test_t5_files_that_are_not_right(t5_folder):
    path = t5_folder / "tokenizer.json"
    whole = path.read_text("utf-8")
    path.write_text(whole[: len(whole) // 2], "utf-8")
    with pytest.raises(UserError, match=r"cannot read .*tokenizer.json \(.*\); download the folder again"):
        load_t5_tokenizer(t5_folder, 16)
    path.unlink()
    with pytest.raises(UserError, match=r"tokenizer.json is missing; "):
        load_t5_tokenizer(t5_folder, 16)


def test_tokenizers_of_other_models_are_refused(t5_folder):
    special, rest = t5_pieces()[:3], t5_pieces()[3:]
    write_t5(t5_folder, [special[2], special[1], special[0], *rest])
    with pytest.raises(UserError, match=r"<pad> and </s> are \[2, 1\]; a T5 tokenizer has \[0, 1\]$"):
        load_t5_tokenizer(t5_folder, 16)
    with pytest.raises(UserError, match=r"tokenizer.json has no token <\|startoftext\|>"):
        load_clip_tokenizer(t5_folder)


@pytest.mark.parametrize("token", ["cat</w>", EOS])
def test_tokens_that_share_an_id_are_refused(clip_folder, token):
    vocabulary, bos, _ = clip_ids(clip_folder)
    (clip_folder / "vocab.json").write_text(json.dumps(vocabulary | {token: bos}), "utf-8")
    for load in (load_clip_tokenizer, load_open_clip_tokenizer):
        with pytest.raises(UserError, match=r"vocab\.json has \d+ tokens, of which some share an id; download"):
            load(clip_folder)


@pytest.mark.parametrize("kept", [0, 1, -1])
def test_merges_cut_off_at_the_end_of_a_line(clip_folder, kept):
    """The file is still one, and gives other tokens."""
    merges = clip_folder / "merges.txt"
    lines = merges.read_text("utf-8").rstrip("\n").split("\n")
    merges.write_text("\n".join([lines[0], *lines[1:][:kept]]) + "\n", "utf-8")
    with pytest.raises(UserError, match=rf"merges\.txt has \d+ merges; must have {len(lines) - 1} for vocab\.json"):
        load_clip_tokenizer(clip_folder)


@pytest.mark.parametrize("order", ["$A", "</s> $A", "$A </s> </s>"])
def test_a_t5_tokenizer_that_does_not_end_prompts(t5_folder, order):
    path = t5_folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(single=order, special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))
    with pytest.raises(UserError, match=r"tokenizer\.json makes \[.*\] of the prompt '.?'; must be \['\.\.\.', 1\]"):
        load_t5_tokenizer(t5_folder, 16)


def test_a_clip_tokenizer_json_that_adds_no_ends(clip_folder, tmp_path_factory):
    whole = _clip_from_merges(clip_folder / "vocab.json", clip_folder / "merges.txt")
    folder = tmp_path_factory.mktemp("whole")
    whole.save(str(folder / "tokenizer.json"))
    content = json.loads((folder / "tokenizer.json").read_text("utf-8")) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json makes \[\] of the prompt ''"):
        load_clip_tokenizer(folder)


def test_what_a_tokenizer_says_of_itself(clip_folder, t5_folder):
    vocabulary, _, eos = clip_ids(clip_folder)
    clip, t5 = load_clip_tokenizer(clip_folder), load_t5_tokenizer(t5_folder, 16)
    assert (clip.length, clip.pad_id, end_id(clip), clip.last_id) == (77, eos, eos, max(vocabulary.values()))
    assert (t5.length, t5.pad_id, t5.last_id) == (16, 0, len(t5_pieces()) - 1)
