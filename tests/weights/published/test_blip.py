"""ImageReward's published file, complete and exact."""

import json
import re
from pathlib import Path

import chex
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from egrpo_jax.models.blip import BlipConfig
from egrpo_jax.weights.layout import export_tensors, published_shapes
from egrpo_jax.weights.published.blip import IGNORED, blip_layout
from tests.layouts import import_tensors
from tests.models.test_blip import SMALL, golden, template
from tests.oracle.imagereward import CASES

PUBLISHED = json.loads((Path(__file__).parents[2] / "golden" / "imagereward_shapes.json").read_text())


def needed(shapes):
    """Those of the published tensors that are not to be ignored."""
    return {
        name: tuple(shape)
        for name, shape in shapes.items()
        if not any(re.fullmatch(pattern, name) for pattern in IGNORED)
    }


def test_every_published_tensor_by_name_and_shape():
    layout = blip_layout(BlipConfig())
    assert (len(PUBLISHED), len(layout)) == (625, 620)
    assert published_shapes(layout, template(BlipConfig())) == needed(PUBLISHED)


def test_every_tensor_of_the_small_models_that_the_published_code_makes():
    for name, case in CASES.items():
        layout = blip_layout(case.config)
        assert published_shapes(layout, template(case.config)) == needed(json.loads(str(golden(name)["shapes"])))


def test_what_no_score_needs_is_ignored():
    unused = PUBLISHED.keys() - needed(PUBLISHED)
    projections = {f"blip.{tower}_proj.{part}" for tower in ("vision", "text") for part in ("weight", "bias")}
    assert unused == projections | {"blip.text_encoder.embeddings.position_ids"}


def test_every_number_of_our_tree_is_held_once():
    flat = flatten_dict(template(SMALL), sep="/")
    held = [(leaf.path, leaf.layer) for e in blip_layout(SMALL) for leaf in e.leaves]
    expected = {(path, layer) for path in flat for layer in (range(2) if "/blocks/" in path else [None])}
    assert len(held) == len(expected)
    assert set(held) == expected


def test_export_then_import_changes_nothing():
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), template(SMALL))
    layout = blip_layout(SMALL)
    tensors = dict(export_tensors(layout, params))
    assert {name: tensor.shape for name, tensor in tensors.items()} == published_shapes(layout, params)
    chex.assert_trees_all_equal(import_tensors(layout, tensors, template(SMALL)), params)
    blocks = params["vision"]["blocks"]["attention"]
    np.testing.assert_array_equal(
        tensors["blip.visual_encoder.blocks.1.attn.qkv.weight"][16:32], blocks["to_k"]["kernel"][1].T
    )
    np.testing.assert_array_equal(tensors["blip.visual_encoder.pos_embed"][0], params["vision"]["positions"])
