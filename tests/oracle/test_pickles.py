"""Checkpoints that PyTorch saves, read without it and with it."""

from collections import OrderedDict

import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.weights.pickles import archive_root, open_pickle
from tests.torch_files import write_checkpoint
from tests.weights.test_files import some_tensors

torch = pytest.importorskip("torch")


def some_state():
    """Every type, views, shared storages, parameters, scalars."""
    torch.manual_seed(0)
    whole = torch.randn(6, 4)
    types = [getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16")]
    types += [torch.int8, torch.uint8, torch.bool]
    return {
        **{str(dtype): (torch.randn(3, 5) * 9).abs().to(dtype) for dtype in types},
        "whole": whole,
        "rows": whole[2:5],
        "row": whole[3],
        "scalar": whole[1, 2],
        "flat": whole.view(-1)[5:],
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "bfloat16_parameter": torch.nn.Parameter(torch.randn(2, 3).bfloat16()),
        "number": torch.tensor(3),
        "one_row": whole[::2][:1],
    }


def assert_as_torch_reads_it(path, key=None):
    expected = torch.load(path, weights_only=True)
    expected = expected[key] if key else expected
    files = open_pickle(path, key)
    assert list(files) == list(expected)
    for name, tensor in expected.items():
        assert str(tensor.dtype) == f"torch.{files[name].dtype}"
        assert files[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(files[name].astype(np.float64), tensor.detach().double().numpy(), err_msg=name)


@pytest.mark.parametrize("key", [None, "state_dict"])
@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_every_kind_of_tensor(tmp_path, key, kind):
    path, state = tmp_path / "model.pt", kind(some_state())
    torch.save({"epoch": 3, key: state, "name": "x", "lr": 0.1} if key else state, path)
    assert archive_root(path) == "model"
    assert_as_torch_reads_it(path, key)


def test_a_module_and_its_optimiser(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    optimiser = torch.optim.AdamW(module.parameters())
    path = tmp_path / "x.pt"
    torch.save({"state_dict": module.state_dict(), "optimizer": optimiser.state_dict(), "scaler": None}, path)
    assert_as_torch_reads_it(path, "state_dict")
    torch.save(module.state_dict(), path)
    assert_as_torch_reads_it(path)


@pytest.mark.parametrize("change", [torch.t, lambda x: x[:, 1:], lambda x: x[0].expand(3, 4), lambda x: x[::2]])
def test_what_is_not_contiguous(tmp_path, change):
    torch.save({"w": change(torch.randn(6, 4))}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt: w \[.*\] is stored with strides"):
        open_pickle(tmp_path / "x.pt")


@pytest.mark.parametrize("saved", [lambda: torch.nn.Linear(2, 2), lambda: torch.device("cpu"), lambda: np.float64(1)])
def test_whole_objects_are_refused(tmp_path, saved):
    torch.save({"x": saved()}, tmp_path / "x.pt")
    with pytest.raises(
        UserError, match=r"x\.pt wants to load (torch|numpy)\.\S+, which could run code, and is refused"
    ):
        open_pickle(tmp_path / "x.pt")


def test_the_format_before_1_6(tmp_path):
    torch.save(some_state(), tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"x\.pt is of the format before PyTorch 1\.6; load it with weights_only=True"):
        open_pickle(tmp_path / "x.pt")


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_torch_reads_the_checkpoints_that_tests_write(tmp_path, key):
    write_checkpoint(tmp_path / "x.pt", some_tensors(), key, epoch=3)
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert state["epoch"] == 3
    for name, tensor in some_tensors().items():
        read = (state[key] if key else state)[name]
        assert str(read.dtype) == f"torch.{tensor.dtype}"
        np.testing.assert_array_equal(read.double().numpy(), tensor.astype(np.float64))
