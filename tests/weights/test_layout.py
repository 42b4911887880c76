"""Tables of published tensors: forms, fused tensors and stacks, both ways."""

import chex
import jax
import numpy as np
import pytest

from egrpo_jax.weights import layout as layouts
from egrpo_jax.weights.layout import (
    CONV,
    LINEAR,
    LINEAR_SWAPPED,
    POINT_CONV,
    SWAPPED,
    Entry,
    Leaf,
    entry,
    export_tensors,
    for_layers,
    leaf_rows,
    linear,
    published_shapes,
    split_tensor,
)
from tests.layouts import import_tensors
from tests.weights.test_load import LAYOUT, params, published, template

PLACES = ((0, 0), (0, 1), (1, 0), (1, 1))


@pytest.mark.parametrize(
    ("form", "shape", "expected"),
    [
        (layouts.AS_IS, (2, 3), lambda x: x),
        (LINEAR, (2, 3), lambda x: np.einsum("oi->io", x)),
        (CONV, (2, 3, 5, 7), lambda x: np.einsum("oihw->hwio", x)),
        (POINT_CONV, (2, 3, 1, 1), lambda x: np.einsum("oihw->io", x)),
        (SWAPPED, (4,), lambda x: x[[2, 3, 0, 1]]),
        (LINEAR_SWAPPED, (4, 3), lambda x: np.einsum("oi->io", x[[2, 3, 0, 1]])),
        (layouts.SQUEEZED, (1, 3, 2), lambda x: np.einsum("noi->oi", x)),
        # Two channels: c0 of the places 00, 01, 10, 11, then c1 of them.
        (layouts.PATCH_CONV, (3, 2, 2, 2), lambda x: np.stack([x[:, c, i, j] for c in (0, 1) for i, j in PLACES])),
        (layouts.PATCH_ROWS, (8,), lambda x: x[[0, 2, 4, 6, 1, 3, 5, 7]]),
        (layouts.LINEAR_PATCH_ROWS, (8, 3), lambda x: np.einsum("oi->io", x[[0, 2, 4, 6, 1, 3, 5, 7]])),
        (layouts.LINEAR_PATCH_COLUMNS, (3, 8), lambda x: np.einsum("oi->io", x[:, [0, 2, 4, 6, 1, 3, 5, 7]])),
    ],
)
def test_forms_and_their_inverses(form, shape, expected):
    tensor = np.arange(np.prod(shape)).reshape(shape)
    ours = form.to_ours(tensor)
    np.testing.assert_array_equal(ours, expected(tensor))
    np.testing.assert_array_equal(form.to_published(ours), tensor)


def test_builders():
    assert entry("x", "a", "b", form=CONV) == Entry("x", (Leaf("a"), Leaf("b")), CONV)
    assert linear("x", "a", "b") == (
        Entry("x.weight", (Leaf("a/kernel"), Leaf("b/kernel")), LINEAR),
        Entry("x.bias", (Leaf("a/bias"), Leaf("b/bias"))),
    )
    assert for_layers(2, [entry("x.{}.y", "a")]) == (Entry("x.0.y", (Leaf("a", 0),)), Entry("x.1.y", (Leaf("a", 1),)))


def test_shapes_of_published_tensors():
    expected = {name: tensor.shape for name, tensor in published(params()).items()}
    assert published_shapes(LAYOUT, template()) == expected
    assert list(published_shapes(LAYOUT, params())) == [e.name for e in LAYOUT]


def test_shapes_take_no_memory():
    """16 TB as numbers; the forms that join parts are the exception, and FLUX has one such tensor."""
    huge = {"x": jax.ShapeDtypeStruct((2_000_000, 2_000_000), np.float32)}
    assert published_shapes((entry("x", "x", form=LINEAR),), huge) == {"x": (2_000_000, 2_000_000)}


def test_rows_of_a_fused_tensor():
    tensors = {e.name: e for e in LAYOUT}
    fused = tensors["h.1.qkv.weight"]
    assert leaf_rows(fused, template()) == (8, 2, 6)
    assert leaf_rows(tensors["temperature"], template()) == (0,)
    parts = dict(split_tensor(fused, published(params())["h.1.qkv.weight"], (8, 2, 6)))
    assert list(parts) == [Leaf(f"h/{name}/kernel", 1) for name in "qkv"]
    for name in "qkv":
        np.testing.assert_array_equal(parts[Leaf(f"h/{name}/kernel", 1)], params()["h"][name]["kernel"][1])


def test_import_and_export_are_what_a_published_model_says():
    tensors = published(params())
    chex.assert_trees_all_equal(import_tensors(LAYOUT, tensors, template()), params())
    exported = dict(export_tensors(LAYOUT, jax.device_put(params())))
    assert list(exported) == [e.name for e in LAYOUT]
    chex.assert_trees_all_equal(exported, tensors)
