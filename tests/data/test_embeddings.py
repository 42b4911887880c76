"""Embeddings on disk: made once, resumed, looked up, iterated with a state, and damage to them."""

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


def test_damage_is_named(tmp_path):
    with pytest.raises(UserError, match=r"settings\.json: .*expected a folder of embeddings"):
        EmbeddingStore(tmp_path)
    write(tmp_path)
    sidecar = tmp_path / "00001.jsonl"
    lines = sidecar.read_text()
    sidecar.write_text(lines.replace("prompt 4", "prompt 8"))
    with pytest.raises(UserError, match=r"cannot read .*00001\.jsonl: a checksum differs"):
        EmbeddingStore(tmp_path)
    sidecar.write_text(lines.splitlines()[0] + "\n")
    with pytest.raises(UserError, match="has 5 prompts and 7 embeddings"):
        EmbeddingStore(tmp_path)
    sidecar.write_text(lines)
    (tmp_path / "00001.arrayrecord").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"cannot read the embeddings|has 7 prompts|damaged"):
        EmbeddingStore(tmp_path)
    for path in tmp_path.glob("*.arrayrecord"):
        path.unlink()
    with pytest.raises(UserError, match="found no embeddings in"):
        EmbeddingStore(tmp_path)


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "file" / "embeddings")


def test_hashes_are_of_the_text():
    assert prompt_hash("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
