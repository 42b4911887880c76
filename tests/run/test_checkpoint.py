import contextlib
import gc
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import egrpo_jax
from egrpo_jax.common.errors import UserError
from egrpo_jax.run.checkpoint import Checkpoints

# When one array cannot be read, Orbax drops the reads of the others, and Python complains when it collects those.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(egrpo_jax.__file__).parents[1]), "JAX_PLATFORMS": "cpu"}


@pytest.fixture(autouse=True)
def collect_dropped_reads():
    yield
    gc.collect()


def make_state(seed=0):
    """One of each thing a run keeps: weights in two dtypes, a masked optimizer state, a key, counters, a None."""
    params = {
        "kernel": jax.random.normal(jax.random.key(seed), (64, 32)),
        "frozen": jnp.full((3, 4), 1.5, jnp.bfloat16),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), {"kernel": True, "frozen": False})
    )
    return {
        "params": params,
        "optimizer": optimizer.init(params),
        "key": jax.random.key_data(jax.random.key(seed + 7)),
        "iteration": jnp.int32(seed),
        "flags": jnp.array([True, False]),
        "nothing": None,
    }


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A directory with good checkpoints of the iterations 1 and 2."""
    directory = tmp_path_factory.mktemp("good")
    checkpoints = Checkpoints(directory)
    for iteration in (1, 2):
        checkpoints.save(iteration, make_state(iteration), {"epoch": iteration, "rate": 0.1})
    checkpoints.close()
    return directory


@pytest.fixture
def directory(good, tmp_path):
    """A copy of `good` to damage."""
    return Path(shutil.copytree(good, tmp_path / "checkpoints"))


def biggest(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_restores_every_bit(good):
    checkpoints = Checkpoints(good)
    iteration, state, meta = checkpoints.restore_latest(make_state())
    assert (iteration, meta) == (2, {"epoch": 2, "rate": 0.1})
    assert_same(state, make_state(2))
    assert checkpoints.damaged == []


def test_restores_into_an_abstract_template_with_its_shardings(good):
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec())
    plain = jax.eval_shape(make_state)
    sharded = jax.tree.map(lambda leaf: leaf.update(sharding=sharding), plain)
    for template in (plain, sharded):
        _, state, _ = Checkpoints(good).restore_latest(template)
        assert_same(state, make_state(2))
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(state))


def test_restores_a_part(good):
    wanted = {"params": {"kernel": make_state()["params"]["kernel"]}, "iteration": jnp.int32(0)}
    iteration, state, meta = Checkpoints(good).restore_latest(wanted, partial=True)
    expected = make_state(2)
    assert_same(state, {"params": {"kernel": expected["params"]["kernel"]}, "iteration": expected["iteration"]})
    assert (iteration, meta["epoch"]) == (2, 2)
    with pytest.raises(UserError, match=r"another model: params\.kernel is float32\[64, 32\] there, float32\[2\] here"):
        Checkpoints(good).restore_latest({"params": {"kernel": jnp.zeros(2)}}, partial=True)
    with pytest.raises(UserError, match=r"another model: params\.other is nothing there"):
        Checkpoints(good).restore_latest({"params": {"other": jnp.zeros(2)}}, partial=True)


def test_a_template_that_cannot_be_sharded_is_no_damage(directory):
    sharding = NamedSharding(jax.sharding.AbstractMesh((3,), ("data",)), PartitionSpec("data"))
    template = make_state() | {"key": jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=sharding)}
    with pytest.raises(ValueError, match="evenly divide"):
        Checkpoints(directory).restore_latest(template)
    assert (directory / "2").exists()


def test_nothing_there(tmp_path):
    assert Checkpoints(tmp_path / "new").restore_latest(make_state()) is None


def test_keeps_the_newest_and_ignores_saving_one_twice(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for iteration in (1, 2, 3, 3):
        checkpoints.save(iteration, {"x": jnp.arange(iteration)}, {})
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    with pytest.raises(ValueError, match="at least 2"):
        Checkpoints(tmp_path, keep=1)


def test_saving_does_not_see_later_changes(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    values = np.zeros(1000, np.float32)
    checkpoints.save(1, {"x": values, "y": jnp.asarray(values)}, {})
    values += 1
    checkpoints.wait()
    _, state, _ = checkpoints.restore_latest({"x": jnp.zeros(1000), "y": jnp.zeros(1000)})
    assert not np.any(state["x"])
    assert not np.any(state["y"])


DAMAGE = {
    "data truncated": lambda folder: os.truncate(biggest(folder), biggest(folder).stat().st_size // 2),
    "data deleted": lambda folder: biggest(folder).unlink(),
    "data garbage": lambda folder: biggest(folder).write_bytes(b"garbage" * 100),
    "data bit flipped": lambda folder: flip_bit(biggest(folder)),
    "data emptied": lambda folder: os.truncate(biggest(folder), 0),
    "manifest deleted": lambda folder: (folder / "state/manifest.ocdbt").unlink(),
    "manifest garbage": lambda folder: (folder / "state/manifest.ocdbt").write_bytes(b"garbage"),
    "tree truncated": lambda folder: os.truncate(folder / "state/_METADATA", 100),
    "tree deleted": lambda folder: (folder / "state/_METADATA").unlink(),
    "meta deleted": lambda folder: (folder / "meta/metadata").unlink(),
    "meta not UTF-8": lambda folder: (folder / "meta/metadata").write_bytes(b"\xff\xfe"),
    "meta other JSON": lambda folder: (folder / "meta/metadata").write_text("3"),
    "meta bit flipped": lambda folder: flip_bit(folder / "meta/metadata"),
    "state missing": lambda folder: shutil.rmtree(folder / "state"),
    "all missing": lambda folder: [shutil.rmtree(path) for path in folder.iterdir() if path.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_falls_back(directory, damage, capsys):
    damage(directory / "2")
    checkpoints = Checkpoints(directory)
    iteration, state, meta = checkpoints.restore_latest(make_state())
    assert (iteration, meta["epoch"]) == (1, 1)
    assert_same(state, make_state(1))
    assert [path.name for path in checkpoints.damaged] == ["damaged-2-0"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: checkpoint 2 is damaged (")
    assert line.endswith(f"); moved to {directory}/damaged-2-0, continuing from iteration 1")

    checkpoints.save(2, make_state(5), {})
    checkpoints.wait()
    iteration, state, _ = checkpoints.restore_latest(make_state())
    assert iteration == 2
    assert_same(state, make_state(5))
    assert (directory / "damaged-2-0").exists()


def test_who_only_reads_changes_nothing(directory, capsys, caplog):
    """The run may be under way: what it is just writing is half written, and not a killed save's."""
    (directory / "3.orbax-checkpoint-tmp").mkdir()
    (directory / "2" / "_CHECKPOINT_METADATA").write_text("{")
    flip_bit(directory / "2/meta/metadata")
    before = sorted(directory.rglob("*"))
    with contextlib.closing(Checkpoints(directory, read_only=True)) as checkpoints:
        iteration, state, _ = checkpoints.restore_latest(make_state())
    assert iteration == 1
    assert_same(state, make_state(1))
    assert sorted(directory.rglob("*")) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: checkpoint 2 is damaged (")
    assert line.endswith("); iteration 1 is read")
    assert not caplog.records
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        checkpoints.restore_latest(make_state())
        checkpoints.save(4, make_state(4), {})
    assert not (directory / "3.orbax-checkpoint-tmp").exists()
    assert (directory / "damaged-2-0").exists()


def test_damaged_twice_keeps_both(directory):
    for number in range(2):
        (directory / "2/meta/metadata").unlink()
        checkpoints = Checkpoints(directory)
        assert checkpoints.restore_latest(make_state())[0] == 1
        assert checkpoints.damaged == [directory / f"damaged-2-{number}"]
        checkpoints.save(2, make_state(2), {})
        checkpoints.close()


def test_all_damaged_is_never_a_fresh_start(directory):
    for iteration in ("1", "2"):
        biggest(directory / iteration).unlink()
    for _ in range(2):  # nothing is moved, so a restart says the same
        with pytest.raises(UserError, match=f"every checkpoint in {directory} .*2, 1.* damaged"):
            Checkpoints(directory).restore_latest(make_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iteration": jnp.zeros(2, jnp.int32)}, r"iteration is int32\[\] there, int32\[2\] here"),
        ({"iteration": jnp.float32(0)}, r"iteration is int32\[\] there, float32\[\] here"),
        ({"extra": jnp.zeros(2)}, r"extra is nothing there, float32\[2\] here"),
        ({"params": {"frozen": jnp.zeros((3, 4), jnp.bfloat16)}}, r"params.kernel is float32\[64, 32\] there, nothing"),
    ],
)
def test_another_model_is_no_damage(directory, change, message):
    with pytest.raises(UserError, match=f"{directory}/2 is a checkpoint of another model: {message}"):
        Checkpoints(directory).restore_latest(make_state() | change)
    assert (directory / "2").exists()


def test_errors_that_say_nothing_about_the_files_pass_through(directory, monkeypatch):
    checkpoints = Checkpoints(directory)
    for error in (KeyboardInterrupt(), MemoryError(), PermissionError("no"), ValueError("UNAVAILABLE: later")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(checkpoints, "_restore", fail)
        with pytest.raises(type(error)):
            checkpoints.restore_latest(make_state())
    assert (directory / "2").exists()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write checkpoints in .*file/checkpoints"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=f"cannot write checkpoints in {tmp_path}/checkpoints: File exists"):
        Checkpoints(tmp_path / "checkpoints")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_not_finite_is_never_written(tmp_path, value, dtype):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"params": {"w": jnp.ones(3, dtype)}, "iteration": 1}, {})
    broken = {"params": {"w": jnp.ones(3, dtype).at[1].set(value)}, "iteration": 2}
    with pytest.raises(UserError, match=r"no checkpoint of iteration 2 is written: params\.w is not finite"):
        checkpoints.save(2, broken, {})
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


FULL = """
import os, resource, signal, sys
import jax.numpy as jnp
from egrpo_jax.common.errors import UserError
from egrpo_jax.run.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
state = {"x": jnp.arange(1 << 16) / 7}
checkpoints.save(1, state, {})
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))  # no file may grow beyond this
try:
    checkpoints.save(2, state, {})
    checkpoints.wait()
except UserError as error:
    print(error, flush=True)
    os._exit(2)  # as programs end, while threads may still write
"""


@pytest.mark.parametrize("size", [100, 1000, 50_000])  # of meta, of what tells of the arrays, of the arrays
def test_a_full_disk(tmp_path, size):
    done = run_script(FULL, tmp_path, size)
    assert done.stdout == f"cannot write a checkpoint in {tmp_path}: File too large\n"
    state = {"x": jnp.arange(1 << 16) / 7}
    later = Checkpoints(tmp_path)
    assert later.restore_latest(state)[0] == 1
    later.save(3, state, {})
    later.close()
    assert Checkpoints(tmp_path).restore_latest(state)[0] == 3


def run_script(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)


KILLED = """
import itertools, sys
import jax.numpy as jnp
from egrpo_jax.run.checkpoint import Checkpoints
state = lambda iteration: {str(leaf): jnp.full((256, 1024), iteration + leaf, jnp.float32) for leaf in range(4)}
checkpoints = Checkpoints(sys.argv[1])
found = checkpoints.restore_latest(state(0))
start = found[0] if found else 0
for iteration in itertools.count(start + 1):
    checkpoints.save(iteration, state(iteration), {"iteration": iteration})
    if iteration == start + 2:
        print("ready", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path):
    newest = 0
    for delay in (0.0, 0.013, 0.071, 0.2):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert child.stdout.readline() == b"ready\n"
        time.sleep(delay)
        child.kill()
        child.wait()
        child.stdout.close()
        template = {str(leaf): jnp.zeros((256, 1024)) for leaf in range(4)}
        checkpoints = Checkpoints(tmp_path)
        iteration, state, meta = checkpoints.restore_latest(template)
        checkpoints.close()
        assert iteration > newest
        assert meta == {"iteration": iteration}
        assert checkpoints.damaged == []
        assert all(np.all(state[str(leaf)] == iteration + leaf) for leaf in range(4))
        assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]
        newest = iteration
