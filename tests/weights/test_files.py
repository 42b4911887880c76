"""Safetensors read as the safetensors library writes them; every damaged file named in one line."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from egrpo_jax.common.errors import UserError
from egrpo_jax.weights.files import DTYPES, PREFIXES, open_tensors, shorten


def some_tensors():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "b.weight": rng.standard_normal((2, 3, 4)).astype(jnp.bfloat16),
        "c": np.array(2.5, np.float16),
        "ids": np.arange(7),
    }


def assert_same(files, tensors):
    assert dict(files).keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert files[name].dtype == files.stored[name].dtype == tensor.dtype
        assert files.stored[name].shape == tensor.shape
        np.testing.assert_array_equal(files[name], tensor)


def shards_in(folder, stem="diffusion_pytorch_model"):
    """`some_tensors` in two shards with an index."""
    tensors = some_tensors()
    weight_map = {}
    for number, names in enumerate((["a.weight", "c"], ["b.weight", "ids"]), start=1):
        file = f"{stem}-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("name", ["diffusion_pytorch_model", "model", "flux1-dev"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_one_file_with_or_without_naming_it(tmp_path, name, as_folder):
    save_file(some_tensors(), tmp_path / f"{name}.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    assert_same(open_tensors(tmp_path if as_folder else tmp_path / f"{name}.safetensors"), some_tensors())


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_shards_with_an_index(tmp_path, stem, as_folder):
    index = shards_in(tmp_path, stem)
    assert_same(open_tensors(str(tmp_path) if as_folder else index), some_tensors())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_type(tmp_path, dtype):
    values = np.array([0, 1, 1, 0, 1]).astype(dtype)
    # The library's NumPy face cannot write 8-bit floats: the header is the same but for the name.
    save_file({"x": values.view(np.uint8) if "float8" in dtype.name else values}, tmp_path / "x.safetensors")
    if "float8" in dtype.name:
        name = {stored: name for name, stored in DTYPES.items()}[dtype]
        replace_header(tmp_path / "x.safetensors", lambda header: header["x"].update(dtype=name))
    assert_same(open_tensors(tmp_path), {"x": values})


def replace_header(path, change):
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_names_is_taken_off(tmp_path, prefix):
    tensors = some_tensors()
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    assert_same(open_tensors(tmp_path), tensors)


@pytest.mark.parametrize("beside", ["vae.x", "first_stage_model.x", "text_encoders.t5xxl.x"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_transformer_of_a_file_that_holds_other_models_too(tmp_path, prefix, beside):
    tensors = some_tensors()
    prefixed = {prefix + name: tensor for name, tensor in tensors.items()}
    save_file(prefixed | {beside: np.zeros(3)}, tmp_path / "x.safetensors")
    assert_same(open_tensors(tmp_path), tensors)
    save_file(prefixed | {"stray": np.zeros(3)}, tmp_path / "x.safetensors")
    assert set(open_tensors(tmp_path)) == {*prefixed, "stray"}


def test_one_model_of_a_file_that_holds_several(tmp_path):
    save_file({"a.x": np.zeros(3), "b.x": np.ones(2), "b.y": np.ones(1)}, tmp_path / "x.safetensors")
    assert_same(open_tensors(tmp_path).under("b."), {"x": np.ones(2), "y": np.ones(1)})


def test_a_tensor_is_a_view_that_nobody_can_write_through(tmp_path):
    save_file(some_tensors(), tmp_path / "x.safetensors")
    tensor = open_tensors(tmp_path)["a.weight"]
    assert not tensor.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        tensor[0, 0] = 1


DAMAGED = r"^\S+x\.safetensors is damaged: [^\n]+; give a safetensors file, or download it again$"


def test_a_file_cut_off_anywhere_or_with_more_behind_it(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(some_tensors(), path)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 9, 8, 7, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=DAMAGED):
            open_tensors(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(UserError, match=DAMAGED):
        open_tensors(path)


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 a pickle of PyTorch" * 10,
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{]",
        (8).to_bytes(8, "little") + b'{"x": 1}',
        (20).to_bytes(8, "little") + b'{"x": {"shape": [1]}',
        (2**63).to_bytes(8, "little") + b"{}",
    ],
)
def test_another_format(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=DAMAGED):
        open_tensors(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["c"].update(shape=[3]),
        lambda header: header["c"].update(shape=[-1]),
        lambda header: header["c"].update(shape=[2**62, 2**62]),
        lambda header: header["c"].update(data_offsets=[-2, 0]),
        lambda header: header["c"].update(dtype="F32"),
        lambda header: header["c"].update(dtype="X9"),
        lambda header: header["c"].update(header["ids"]),  # both of the same bytes, and none of others
        lambda header: header.pop("c"),
    ],
)
def test_a_header_that_contradicts_itself(tmp_path, change):
    save_file(some_tensors(), tmp_path / "x.safetensors")
    replace_header(tmp_path / "x.safetensors", change)
    with pytest.raises(UserError, match=DAMAGED):
        open_tensors(tmp_path)


def test_a_type_that_numpy_has_not(tmp_path):
    save_file({"c": np.zeros(2, np.uint8)}, tmp_path / "x.safetensors")
    replace_header(tmp_path / "x.safetensors", lambda header: header["c"].update(dtype="F8_E8M0"))
    with pytest.raises(UserError, match=r"x\.safetensors: c is of type F8_E8M0; must be one of F64, F32"):
        open_tensors(tmp_path)


def test_a_name_that_is_there_twice(tmp_path):
    """JSON does not forbid it; the second has bytes of its own."""
    fields = '"a": {"dtype": "U8", "shape": [1], "data_offsets": [%d, %d]}'
    header = f"{{{fields % (0, 1)}, {fields % (1, 2)}}}".encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    with pytest.raises(UserError, match=DAMAGED):
        open_tensors(tmp_path)


def test_a_pointer_of_git_lfs(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="pointer of Git LFS, not the weights; fetch them with: git lfs pull"):
        open_tensors(tmp_path)


def test_nothing_there_or_too_much(tmp_path):
    with pytest.raises(UserError, match=r"^cannot read \S+absent\.safetensors: No such file or directory$"):
        open_tensors(tmp_path / "absent.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"has no diffusion_pytorch_model\.safetensors or model\.safetensors; give the folder of"
    ):
        open_tensors(tmp_path)
    for name in ("ae", "flux1-dev"):
        save_file(some_tensors(), tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"holds ae\.safetensors, flux1-dev\.safetensors; name one of them$"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model.fp16"])
def test_shards_without_their_index(tmp_path, stem):
    shards_in(tmp_path, stem).unlink()
    assert_same(open_tensors(tmp_path), some_tensors())
    (tmp_path / f"{stem}-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=rf"lacks {stem}-00001-of-00002\.safetensors, of which there are 2; download"):
        open_tensors(tmp_path)


def test_shards_without_their_index_that_are_not_one_models(tmp_path):
    shards_in(tmp_path).unlink()
    save_file({"c": np.zeros(1)}, tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors")
    twice = r"has c both in \S+-00001-of-00002\.safetensors and in \S+-00002-of-00002\.safetensors; download it again$"
    with pytest.raises(UserError, match=twice):
        open_tensors(tmp_path)
    save_file({"c": np.zeros(1)}, tmp_path / "diffusion_pytorch_model-00001-of-00003.safetensors")
    with pytest.raises(UserError, match=r"holds .*00001-of-00002.*00001-of-00003.*; leave those of one model there$"):
        open_tensors(tmp_path)


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"^cannot read \S+model\.safetensors: Is a directory$"):
        open_tensors(tmp_path)


def test_an_index_and_its_shards_disagree(tmp_path):
    index = shards_in(tmp_path)
    shard = tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors"
    save_file({"ids": some_tensors()["ids"]}, shard)
    with pytest.raises(UserError, match=r"index\.json promises b\.weight, not in the files it names"):
        open_tensors(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=rf"lacks {shard.name}, named in {index.name}; download the folder again$"):
        open_tensors(tmp_path)
    for content in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": 3}}'):
        index.write_text(content)
        with pytest.raises(UserError, match=r"index\.json is not an index of safetensors"):
            open_tensors(tmp_path)


def test_long_lists_are_shortened():
    assert shorten(["a", "b"]) == "a, b"
    assert shorten([str(number) for number in range(11)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 3 more"
