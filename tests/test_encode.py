"""Jobs that encode into one folder: one at a time."""

import pytest

from egrpo_jax.common.lock import owned
from egrpo_jax.data.embeddings import EmbeddingStore
from tests import programs, tiny_flux


@pytest.mark.slow
def test_a_second_job_is_refused_at_once(tmp_path):
    base, out = tiny_flux.write_pipeline(tmp_path / "base"), tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("a red cat\na dog\n")
    arguments = (f"--config=tests/tiny_flux.py:{base}", f"--prompt_file={tmp_path / 'prompts.txt'}", f"--out={out}")
    with owned(out, "the folder"):
        done = programs.run("encode", *arguments)
        assert [path.name for path in out.iterdir()] == [".lock"]
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: the folder of embeddings {out} is in use by process ")
    assert programs.run("encode", *arguments).returncode == 0
    assert EmbeddingStore(out).prompts == ["a red cat", "a dog"]
    assert not (out / ".lock").exists()
