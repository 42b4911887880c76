"""Checkpoints of PyTorch read exactly; whatever else a pickle could do refused, with nothing of it run."""

import os
import pickle
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest

from egrpo_jax.common.errors import UserError
from egrpo_jax.weights import pickles
from egrpo_jax.weights.files import DTYPES
from egrpo_jax.weights.pickles import STORAGES, archive_root, open_pickle
from tests.torch_files import dict_opcodes, integer, tensor_opcodes, text, write_archive, write_checkpoint
from tests.weights.test_files import assert_same, some_tensors


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_a_state_dict_by_itself_or_under_a_key(path, key):
    write_checkpoint(path, some_tensors(), key, epoch=3)
    assert_same(open_pickle(str(path), key), some_tensors())


@pytest.mark.parametrize("name", STORAGES.values())
def test_every_type(path, name):
    tensors = {"x": np.array([[0, 1, 1], [0, 1, 0]]).astype(DTYPES[name])}
    write_checkpoint(path, tensors)
    assert_same(open_pickle(path), tensors)


def test_views_of_one_storage(path):
    whole = np.arange(12, dtype=np.float32)
    entries = {
        "rows": tensor_opcodes("0", whole[4:].reshape(2, 4), offset=4),
        "one_row": tensor_opcodes("0", whole[None, :5], strides=(99, 1)),
        "scalar": tensor_opcodes("0", whole[7], offset=7),
    }
    write_archive(path, dict_opcodes(entries), [whole.tobytes()])
    expected = {"rows": whole[4:].reshape(2, 4), "one_row": whole[None, :5], "scalar": whole[7]}
    assert_same(open_pickle(path), expected)


def test_a_tensor_is_a_view_that_nobody_can_write_through(path):
    write_checkpoint(path, some_tensors())
    tensor = open_pickle(path)["a.weight"]
    assert not tensor.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        tensor[0, 0] = 1


def test_the_root_of_the_archive(path):
    write_checkpoint(path, some_tensors(), root="HPS_v2.1_compressed")
    assert archive_root(path) == "HPS_v2.1_compressed"
    assert_same(open_pickle(path), some_tensors())


def test_a_state_dict_of_a_module_has_an_attribute(path):
    """`Module.state_dict()` notes versions of its parts as an attribute of the dict."""
    metadata = text("_metadata") + dict_opcodes({"": dict_opcodes({"version": integer(1)})})
    x = np.ones(2, np.float32)
    write_archive(path, dict_opcodes({"x": tensor_opcodes("0", x)}) + b"}" + metadata + b"sb", [x.tobytes()])
    assert_same(open_pickle(path), {"x": x})


class Runs:
    """What a malicious pickle holds: on loading it calls `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attack(*calls, protocol=2):
    return pickle.dumps(list(calls), protocol)


STORAGE = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
NAMED = {
    "reduce_system": (lambda file: attack(Runs(os.system, f"touch {file}")), r"posix\.system"),
    "reduce_eval": (lambda file: attack(Runs(eval, f"open({str(file)!r}, 'w')")), r"__builtin__\.eval"),
    "protocol_4": (lambda file: attack(Runs(os.mkdir, str(file)), protocol=4), r"posix\.mkdir"),
    "inst": (lambda file: b"(V" + str(file).encode() + b"\nios\nmkdir\n.", r"os\.mkdir"),
    "obj": (lambda file: b"(cos\nmkdir\nV" + str(file).encode() + b"\no.", r"os\.mkdir"),
    "after_an_allowed_name": (lambda file: STORAGE + attack(Runs(os.mkdir, str(file))), r"posix\.mkdir"),
    "dotted": (lambda _: b"\x80\x04\x8c\x0bcollections\x8c\x0fabc.sys.modules\x93.", r"collections\.abc\.sys\.modules"),
    "dotted_below_an_allowed_name": (
        lambda _: b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93.",
        r"collections\.OrderedDict\.__init__",
    ),
    "getattr": (lambda _: attack(Runs(getattr, OrderedDict, "fromkeys")), r"__builtin__\.getattr"),
    "torch_itself": (lambda _: b"ctorch.serialization\nload\n.", r"torch\.serialization\.load"),
    "another_storage": (lambda _: b"ctorch\nQInt8Storage\n.", r"torch\.QInt8Storage"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_a_pickle_that_names_anything_else_is_refused_and_nothing_runs(path, tmp_path, name):
    make, named = NAMED[name]
    mark = tmp_path / "ran"
    write_archive(path, make(mark)[:-1])
    with pytest.raises(UserError, match=rf"^\S+model\.pt wants to load {named}, which could run code, and is refused;"):
        open_pickle(path)
    assert not mark.exists()


@pytest.mark.parametrize("load", ["eval", "mkdir"])
def test_the_attacks_would_run(tmp_path, load):
    """Python's own unpickler runs them."""
    mark = tmp_path / "ran"
    make = {"eval": NAMED["reduce_eval"], "mkdir": NAMED["inst"]}[load][0]
    pickle.loads(b"\x80\x02" + make(mark))
    assert mark.exists()


X = np.ones((2, 3), np.float32)
MISUSED = {
    "storage_called": STORAGE + b")R",
    "storage_built": STORAGE + b"}" + text("x") + integer(1) + b"sb",
    "storage_made": STORAGE + b")\x81",
    "rebuild_without_arguments": REBUILD + b")R",
    "rebuild_of_no_storage": REBUILD + b"(" + integer(1) + integer(0) + b"))tR",
    "rebuild_given_attributes": REBUILD + b"N}" + text("__defaults__") + b")s\x86b",
    "rebuild_given_entries": REBUILD + b"}" + text("__wrapped__") + STORAGE + b"sb",
    "parameter_of_no_tensor": b"ctorch._utils\n_rebuild_parameter\n(K\x01\x88NtR",
    "dict_of_numbers": b"ccollections\nOrderedDict\n(K\x01tR",
    "dict_class_given_attributes": b"ccollections\nOrderedDict\nN}" + text("items") + STORAGE + b"s\x86b",
    "storage_id_of_one_part": b"(" + text("storage") + b"tQ",
    "storage_id_of_no_name": b"(" + text("storage") + STORAGE + b"}" + text("cpu") + integer(6) + b"tQ",
    "module_id": b"(" + text("module") + STORAGE + text("0") + text("cpu") + integer(6) + b"tQ",
    "negative_offset": tensor_opcodes("0", X, offset=-1),
    "negative_stride": tensor_opcodes("0", X, strides=(-3, 1)),
    "strides_of_another_rank": tensor_opcodes("0", X, strides=(1,)),
    "no_memo": b"h\x05",
    "nothing": b"",
}


@pytest.mark.parametrize("name", MISUSED)
def test_what_a_state_dict_needs_used_otherwise_is_refused(path, name):
    before = dict(vars(pickles))
    allowed = dict(pickles._ALLOWED)
    write_archive(path, MISUSED[name], [X.tobytes()])
    with pytest.raises(UserError, match=r"model\.pt is damaged: its data\.pkl is no state dict \([^\n]+\); download"):
        open_pickle(path)
    assert (vars(pickles), pickles._ALLOWED) == (before, allowed)
    write_checkpoint(path, some_tensors())
    assert_same(open_pickle(path), some_tensors())


def test_a_dict_that_hides_its_entries_hides_nothing(path):
    """Attributes that the pickle sets on a dict are never used."""
    hidden = b"N}(" + text("items") + STORAGE + text("keys") + STORAGE + b"u\x86b"
    write_archive(path, dict_opcodes({"x": tensor_opcodes("0", X)}) + hidden, [X.tobytes()])
    assert_same(open_pickle(path), {"x": X})


@pytest.mark.parametrize(
    ("shape", "strides"), [((2, 3), (1, 2)), ((2, 3), (6, 1)), ((2, 3), (0, 1)), ((3, 2, 1), (1, 3, 1))]
)
def test_a_tensor_that_is_not_contiguous(path, shape, strides):
    write_archive(path, dict_opcodes({"w": tensor_opcodes("0", X.reshape(shape), strides=strides)}), [bytes(100)])
    message = rf"model\.pt: w \[.*\] is stored with strides \[{', '.join(map(str, strides))}\]; save .* contiguous$"
    with pytest.raises(UserError, match=message):
        open_pickle(path)


def test_what_is_not_asked_for_is_not_looked_at(path):
    """An optimiser's state beside the weights may hold what it likes."""
    weights = dict_opcodes({"x": tensor_opcodes("0", X)})
    momenta = dict_opcodes({"x": tensor_opcodes("9", X, strides=(1, 2))})
    write_archive(path, dict_opcodes({"optimizer": momenta, "state_dict": weights}), [X.tobytes()])
    assert_same(open_pickle(path, "state_dict"), {"x": X})


def test_no_tensors_where_they_should_be(path):
    write_checkpoint(path, some_tensors(), "state_dict", epoch=3)
    with pytest.raises(UserError, match=r"model\.pt has no tensors by name, but state_dict, epoch; is it another"):
        open_pickle(path)
    with pytest.raises(UserError, match=r"model\.pt has no 'model', but state_dict, epoch; is it another"):
        open_pickle(path, "model")
    with pytest.raises(UserError, match=r"model\.pt under 'epoch' has no tensors by name, but nothing"):
        open_pickle(path, "epoch")


def test_a_file_cut_off_anywhere_is_told_so(path):
    write_checkpoint(path, some_tensors())
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 30, 4):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"^\S+model\.pt is cut off, or damaged: [^\n]+; download it again$"):
            open_pickle(path)


def test_a_file_that_lacks_bytes_in_the_middle(path):
    write_checkpoint(path, some_tensors())
    whole = path.read_bytes()
    for start in range(0, len(whole) - 400, 97):
        path.write_bytes(whole[:start] + whole[start + 13 :])
        with pytest.raises(UserError, match=r"model\.pt is (cut off, or )?damaged: [^\n]+; download it again$"):
            open_pickle(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a pointer of Git LFS, not the wei"),
        (pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2), "is of the format before PyTorch 1.6; load"),
        (b"", "is no checkpoint of PyTorch; give one that torch.save wrote, or safetensors"),
        ((8).to_bytes(8, "little") + b'{"x": 1}', "is no checkpoint of PyTorch"),
        (pickle.dumps({"x": 1}), "is no checkpoint of PyTorch"),
    ],
)
def test_another_format(path, content, message):
    path.write_bytes(content)
    for read in (open_pickle, archive_root):
        with pytest.raises(UserError, match=rf"model\.pt {message}"):
            read(path)


def test_another_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "x")
    with pytest.raises(UserError, match=r"is a zip archive, but no checkpoint of PyTorch: it has 0 data\.pkl, not 1"):
        open_pickle(path)


def test_an_archive_that_torch_save_does_not_write(path):
    opcodes = dict_opcodes({"x": tensor_opcodes("0", X)})
    write_archive(path, opcodes, [X.tobytes()], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match=r"model\.pt has archive/byteorder compressed; give the file as torch\.save"):
        open_pickle(path)
    write_archive(path, opcodes, [X.tobytes()], byteorder="big")
    with pytest.raises(UserError, match=r"model\.pt is big-endian; load and save it on a machine that is little-end"):
        open_pickle(path)
    write_archive(path, opcodes)
    with pytest.raises(UserError, match=r"model\.pt is damaged: it lacks archive/data/0; download it again"):
        open_pickle(path)
    write_archive(path, opcodes, [X.tobytes()[:-1]])
    with pytest.raises(UserError, match=r"model\.pt is damaged: x \[2, 3\] is larger than its data; download it again"):
        open_pickle(path)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match=r"^cannot read \S+absent\.pt: No such file or directory$"):
        open_pickle(tmp_path / "absent.pt")
    with pytest.raises(UserError, match=r"^cannot read \S+: Is a directory$"):
        archive_root(tmp_path)


def test_types_are_those_of_the_array(path):
    tensors = {"x": np.ones(3, jnp.bfloat16)}
    write_checkpoint(path, tensors)
    assert open_pickle(path).stored["x"].dtype == jnp.bfloat16
