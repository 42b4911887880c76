"""Embeddings on disk: made once, resumed, looked up, iterated with a state, and damage to them."""

import shutil

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.data.embeddings import EmbeddingStore, prompt_hash, write_embeddings

PROMPTS = [f"prompt {i}" for i in range(7)]
SETTINGS = {"text_tokens": 2}


class Encoder:
    """Arrays that tell the prompt; counts calls, and dies when told so."""

    def __init__(self, dies_at=None):
        self.calls, self.dies_at = [], dies_at

    def __call__(self, prompts):
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        self.calls.append(list(prompts))
        numbers = np.array([int(prompt.split()[1]) for prompt in prompts], np.float32)
        text = jnp.full((len(prompts), 2, 3), numbers[:, None, None], jnp.bfloat16)
        return {"text": np.asarray(text), "pooled": numbers[:, None]}


def write(folder, prompts=PROMPTS, encoder=None, settings=SETTINGS):
    return write_embeddings(folder, prompts, encoder or Encoder(), settings, batch=2, shard_size=3)


def test_written_once_and_found_by_prompt(tmp_path):
    encoder = Encoder()
    assert write(tmp_path, [*PROMPTS, *PROMPTS], encoder) == 7
    assert all(len(call) == 2 for call in encoder.calls)
    store = EmbeddingStore(tmp_path)
    assert store.prompts == PROMPTS
    assert len(store) == 7
    assert "prompt 3" in store
    assert "prompt 9" not in store
    found = store.lookup(["prompt 5", "prompt 0", "prompt 5"])
    np.testing.assert_array_equal(found["pooled"], [[5], [0], [5]])
    assert found["text"].dtype == jnp.bfloat16
    assert found["text"].shape == (3, 2, 3)
    with pytest.raises(KeyError):
        store.lookup(["prompt 9"])


def test_an_interrupted_job_goes_on(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, encoder=Encoder(dies_at=3))  # two batches make a shard: it dies in the second one
    assert EmbeddingStore(tmp_path).prompts == PROMPTS[:3]
    encoder = Encoder()
    assert write(tmp_path, encoder=encoder) == 4
    assert PROMPTS[2] not in {prompt for call in encoder.calls for prompt in call}
    assert EmbeddingStore(tmp_path).prompts == PROMPTS
    assert write(tmp_path, encoder=Encoder(dies_at=0)) == 0
    assert write(tmp_path, ["prompt 20"]) == 1
    np.testing.assert_array_equal(EmbeddingStore(tmp_path).lookup(["prompt 20"])["pooled"], [[20]])


def batches(folder):
    return grain.MapDataset.source(EmbeddingStore(folder)).shuffle(seed=1).repeat().batch(2).to_iter_dataset()


def test_an_iterator_goes_on_from_its_state(tmp_path):
    write(tmp_path)
    iterator = iter(batches(tmp_path))
    seen = [next(iterator)["pooled"].ravel().tolist() for _ in range(3)]
    state = iterator.get_state()
    expected = [next(iterator)["pooled"].ravel().tolist() for _ in range(4)]
    first_epoch = [number for batch in (*seen, expected[0]) for number in batch][:7]
    assert sorted(first_epoch) == list(range(7))
    resumed = iter(batches(tmp_path))
    resumed.set_state(state)
    assert [next(resumed)["pooled"].ravel().tolist() for _ in range(4)] == expected


def test_other_settings_are_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(UserError, match=r"holds embeddings made with .*'text_tokens': 2.*now .*512.*another folder"):
        write(tmp_path, settings={"text_tokens": 512})


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("00001.jsonl", lambda path: path.write_text(path.read_text().replace("prompt 4", "prompt 8")), "a checksum"),
        ("00001.jsonl", lambda path: path.write_text("[]\n"), "it is damaged "),
        ("00001.jsonl", lambda path: path.write_text('{"prompt": "prompt 3"}\n'), "it is damaged "),
        ("00001.jsonl", lambda path: path.write_text('{"prompt": 3, "sha256": "3"}\n'), "it is damaged "),
        ("00001.jsonl", lambda path: path.write_text("[" * 100_000), "it is damaged "),
        ("00001.jsonl", lambda path: cut(path, 150), "it is damaged "),
        ("00001.jsonl", lambda path: path.write_bytes(b"\xff"), "it is damaged "),
        ("00001.jsonl", lambda path: path.unlink(), "No such file"),
        ("00001.arrayrecord", lambda path: path.write_bytes(b""), "it is damaged "),
        ("00001.arrayrecord", lambda path: cut(path, 1 << 16), "it is damaged .cut short"),
        ("00001.arrayrecord", lambda path: cut(path, -10), "it is damaged "),
        ("00001.arrayrecord", lambda path: (path.unlink(), path.mkdir()), "it is damaged "),
        (
            "00001.arrayrecord",
            lambda path: shutil.copy(path.with_stem("00002"), path),
            "1 embeddings for the 3 prompts",
        ),
    ],
)
def test_damage_is_named_and_mended_by_what_the_line_says(tmp_path, name, damage, message):
    write(tmp_path)
    damage(tmp_path / name)
    line = rf"^cannot read .*{name}: .*{message}.*; delete 00001\.jsonl and 00001\.arrayrecord and encode again"
    for read in (EmbeddingStore, write):
        with pytest.raises(UserError, match=line) as raised:
            read(tmp_path)
        assert "\n" not in str(raised.value)
    for path in tmp_path.glob("00001.*"):
        path.rmdir() if path.is_dir() else path.unlink()
    assert write(tmp_path) == 3
    np.testing.assert_array_equal(EmbeddingStore(tmp_path).lookup(PROMPTS)["pooled"].ravel(), range(7))


@pytest.mark.parametrize("number", ["00001", "00002"])
def test_a_lost_shard_is_named(tmp_path, number):
    write(tmp_path)
    (tmp_path / f"{number}.arrayrecord").unlink()
    for read in (EmbeddingStore, write):
        with pytest.raises(UserError, match=rf"{number}\.jsonl: there is no {number}\.arrayrecord beside it; delete"):
            read(tmp_path)


def test_a_shard_that_a_kill_left_unnamed_is_not_lost(tmp_path):
    write(tmp_path)
    (tmp_path / "00002.arrayrecord").rename(tmp_path / "00002.tmp")
    assert EmbeddingStore(tmp_path).prompts == PROMPTS[:6]
    assert write(tmp_path) == 1
    assert EmbeddingStore(tmp_path).prompts == PROMPTS


def test_a_damaged_record_is_named(tmp_path):
    write(tmp_path)
    path = tmp_path / "00001.arrayrecord"
    content = bytearray(path.read_bytes())
    content[400] ^= 1  # in the data of a record, which is read when it is asked for
    path.write_bytes(content)
    store = EmbeddingStore(tmp_path)
    with pytest.raises(UserError, match=r"^the embedding of 'prompt [345]' in .* is damaged \(.*hash mismatch"):
        store.lookup(PROMPTS)


@pytest.mark.parametrize("content", ["{", "[1]", "null", "[" * 100_000, "1" * 5000], ids=range(5))
def test_damaged_settings_are_named(tmp_path, content):
    write(tmp_path)
    (tmp_path / "settings.json").write_text(content)
    for read in (EmbeddingStore, write):
        with pytest.raises(
            UserError, match=r"settings\.json (is no JSON|holds a .*, no object).*; expected a folder of"
        ):
            read(tmp_path)


def test_folders_without_embeddings(tmp_path):
    with pytest.raises(UserError, match=r"settings\.json: No such file.*; expected a folder of embeddings"):
        EmbeddingStore(tmp_path)
    write(tmp_path, [])
    with pytest.raises(UserError, match="found no embeddings in"):
        EmbeddingStore(tmp_path)
    (tmp_path / "notes.arrayrecord").write_text("")
    with pytest.raises(UserError, match="found no embeddings in"):
        EmbeddingStore(tmp_path)
    assert write(tmp_path) == 7


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "file" / "embeddings")


def test_hashes_are_of_the_text():
    assert prompt_hash("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
