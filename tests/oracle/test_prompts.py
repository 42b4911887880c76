"""Prompts of any language and length, empty, with signs that mean something, against diffusers' pipelines."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

from egrpo_jax.parallel.mesh import MeshConfig, make_mesh
from egrpo_jax.pipelines import ModelConfig, load_encoder
from egrpo_jax.pipelines.published import PublishedOptions
from tests import tiny_flux
from tests.oracle import pipeline as oracle

MESH = make_mesh(MeshConfig())
PROMPTS = [
    "",
    "ein roter Fuchs, 一只猫 🦊",
    "wow! !!! a!b <|endoftext|> {} </s>",
    "  spaces\n\nand lines ",
    " ".join(["red", "cat", "dog!", "7,"] * 500),
]


def theirs(pipeline, tokens):
    """The conditioning of `PROMPTS`, by our names."""
    kind = type(pipeline).__name__
    if kind == "ZImagePipeline":
        found, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False, max_sequence_length=tokens)
        return [each.detach().numpy() for each in found]
    others = {"FluxPipeline": 1, "StableDiffusion3Pipeline": 2}.get(kind, 0)
    prompts = {f"prompt_{number}": None for number in range(2, 2 + others)}
    found = pipeline.encode_prompt(prompt=list(PROMPTS), **prompts, max_sequence_length=tokens)
    names = {"FluxPipeline": {"text": 0, "pooled": 1}, "StableDiffusion3Pipeline": {"text": 0, "pooled": 2}}
    return {name: found[place].detach().numpy() for name, place in names.get(kind, {"text": 0}).items()}


@pytest.mark.parametrize("name", ["flux_dev", "sd3_medium", "flux2_base", "z_image"])
def test_conditioning_is_that_of_diffusers(tmp_path, name):
    folder, tokens = oracle.FOLDERS[name](tmp_path / name), oracle.text_tokens(name)
    size = {"height": tiny_flux.SIZE, "width": tiny_flux.SIZE}
    options = PublishedOptions(**size, text_tokens=tokens, dtype="float32", guidance=3.0)
    encoder = load_encoder(ModelConfig("published", str(folder), options))
    with jax.set_mesh(MESH):
        ours = {key: np.asarray(leaf) for key, leaf in encoder(PROMPTS)._asdict().items()}
    expected = theirs(oracle.load(folder), tokens)
    if name == "z_image":
        assert ours["lengths"].tolist() == [len(states) for states in expected]
        for row, states in enumerate(expected):
            np.testing.assert_allclose(ours["text"][row, : len(states)], states, atol=1e-4)
        return
    assert ours.keys() == expected.keys()
    for key, states in expected.items():
        np.testing.assert_allclose(ours[key], states, atol=1e-4, err_msg=key)
