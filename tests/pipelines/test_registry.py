"""The sources of models by name, and what each can do."""

import dataclasses

import pytest

from egrpo_jax.common.errors import ConfigError
from egrpo_jax.pipelines import EXPORTS, Export, ModelConfig, load_encoder, load_pipeline, load_writer
from egrpo_jax.pipelines.registry import SOURCES
from tests import programs


def test_sources_are_named_once_and_have_their_section():
    assert [source.name for source in SOURCES.values()] == list(SOURCES) == ["emoji", "published"]
    sections = {field.name for field in dataclasses.fields(ModelConfig)} - {"name", "path"}
    assert sections <= SOURCES.keys()
    assert EXPORTS == ["diffusers", "orbax", "peft", "pipeline"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fluxx", "config.model.name: found 'fluxx', expected 'emoji', 'published', or module:function of your own"),
        ("builtins:repr", "found 'builtins:repr', expected a function that returns a Pipeline, not str"),
    ],
)
def test_models_that_are_not_there(name, message):
    with pytest.raises(ConfigError) as error:
        load_pipeline(ModelConfig(name))
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["emoji", "tests.toy:pipeline"])
def test_sources_that_cannot_do_everything(tmp_path, name):
    config = ModelConfig(name)
    expected = rf"^config\.model\.name: found '{name}', expected 'published', "
    with pytest.raises(ConfigError, match=expected + "whose embeddings can be stored$"):
        load_encoder(config)
    with pytest.raises(ConfigError, match=expected + "to be written as peft$"):
        load_writer(config, "peft", Export(tmp_path, "float32", copy=False, of_run=False))


def test_a_path_that_is_needed():
    for ask in (load_pipeline, load_encoder):
        with pytest.raises(ConfigError, match=r"^config\.model\.path: found None, expected the folder of a pipeline"):
            ask(ModelConfig("published"))


@pytest.mark.parametrize(
    ("program", "arguments"),
    [("encode", ["--prompt_file=emoji_heldout", "--out={}"]), ("convert", ["--to=peft", "--out={}"])],
)
def test_programs_say_so_in_a_line(tmp_path, program, arguments):
    out = tmp_path / "out"
    done = programs.run(program, "--config=configs/emoji.py", *(part.format(out) for part in arguments))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: config.model.name: found 'emoji', expected 'published', ")
    assert not out.exists()
