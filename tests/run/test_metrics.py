import gc
import json
import math
import resource
import signal
import struct
import sys
from unittest import mock

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from egrpo_jax.common.errors import UserError
from egrpo_jax.run.metrics import MetricsWriter, read_metrics


def write_run(workdir, resume_iteration, iterations):
    writer = MetricsWriter(workdir, resume_iteration)
    for iteration in iterations:
        writer.write(iteration, {"reward/hps/mean": iteration / 7, "loss": np.float32(iteration)})
    writer.close()


def tensorboard_points(workdir):
    """{(name, iteration): value} as TensorBoard shows it: a START hides what came before of its iteration on."""
    points = {}
    for path in sorted((workdir / "tb").iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content, offset = path.read_bytes(), 0
        while offset < len(content):
            (size,) = struct.unpack("<Q", content[offset : offset + 8])
            event = Event.FromString(content[offset + 12 : offset + 12 + size])
            offset += 16 + size
            if event.session_log.status == SessionLog.START:
                points = {key: value for key, value in points.items() if key[1] < event.step}
            points |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return points


def test_a_killed_run_ends_like_one_never_killed(tmp_path):
    write_run(tmp_path / "whole", None, range(9))
    write_run(tmp_path / "killed", None, range(7))
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 7, "lo')
    write_run(tmp_path / "killed", 4, range(5, 9))
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert tensorboard_points(tmp_path / "whole") == tensorboard_points(tmp_path / "killed")
    assert len(tensorboard_points(tmp_path / "killed")) == 18


def test_a_fresh_start_drops_everything(tmp_path):
    write_run(tmp_path, None, range(3))
    write_run(tmp_path, None, range(1))
    assert [line["iteration"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0]
    assert {iteration for _, iteration in tensorboard_points(tmp_path)} == {0}


def test_resuming_from_iteration_zero_keeps_it(tmp_path):
    write_run(tmp_path, None, range(3))
    write_run(tmp_path, 0, [1])
    assert [line["iteration"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]


def test_each_line_is_readable_at_once_and_strict(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.write(1, {"a/b": 0.1, "nan": math.nan, "inf": -math.inf, "array": jax.numpy.float32(2)})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == {"iteration": 1, "a/b": 0.1, "nan": None, "inf": None, "array": 2}
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line["a/b"] == 0.1
    assert math.isnan(line["nan"])
    assert math.isnan(line["inf"])
    writer.close()


@pytest.mark.parametrize("name", ["metrics.jsonl", "tb"])
def test_a_full_disk_is_one_line_and_leaves_whole_lines(tmp_path, capfd, name):
    """A limit on the size of files stands for the disk: of the JSON lines, or of TensorBoard's, which are longer."""
    writer = MetricsWriter(tmp_path, None)
    metrics = {f"reward/{number}": 0.1 for number in range(20)} if name == "metrics.jsonl" else {"x": 0.1}
    writer.write(1, metrics)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = len(before) + 10 if name == "metrics.jsonl" else 50
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(UserError, match=f"^cannot write metrics in {tmp_path}: File too large$"):
            writer.write(2, metrics)
        writer.close()
        del writer
        gc.collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert capfd.readouterr().err == ""
    assert (tmp_path / "metrics.jsonl").read_bytes().startswith(before)
    MetricsWriter(tmp_path, 1).write(2, metrics)
    assert [line["iteration"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_files_that_cannot_be_used(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match="no such file"):
        read_metrics(path)
    bad = (
        "garbage",
        "3",
        "null",
        '{"loss": 1}',
        '{"iteration": null}',
        '{"iteration": 2, "loss": "high"}',
        "[" * 99999,
    )
    for line in bad:
        path.write_text('{"iteration": 1}\n' + line + '\n{"iteration": 3}\n')
        with pytest.raises(UserError, match=r"metrics.jsonl, line 2: found"):
            read_metrics(path)
    path.write_text('{"iteration": 1}\n{"itera')
    assert read_metrics(path) == [{"iteration": 1}]
    with pytest.raises(UserError, match="cannot write"):
        MetricsWriter(path, None)
    (tmp_path / "tb").write_text("")
    with pytest.raises(UserError, match=f"cannot write metrics in {tmp_path}/tb: File exists"):
        MetricsWriter(tmp_path, None)


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'egrpo_jax\[wandb\]'"):
        MetricsWriter(tmp_path, None, wandb=True)


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    wandb = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resume_iteration in (None, 1):
        writer = MetricsWriter(tmp_path, resume_iteration, wandb=True)
        writer.write(1, {"loss": 2.0})
        writer.close()
    first, second = wandb.init.call_args_list
    assert first == second
    assert first.kwargs["resume"] == "allow"
    run = wandb.init.return_value
    assert run.log.call_args_list == 2 * [mock.call({"loss": 2.0}, step=1)]
    assert run.finish.call_count == 2


@pytest.mark.parametrize("found", [b"\xff\xfe", b"", b"not/an/id", None])
def test_a_damaged_identity_of_wandb_is_named(tmp_path, monkeypatch, found):
    monkeypatch.setitem(sys.modules, "wandb", mock.MagicMock())
    path = tmp_path / "wandb_id"
    path.mkdir() if found is None else path.write_bytes(found)
    with pytest.raises(UserError, match=f"{path}: (found .*, expected 32 hexadecimal digits|Is a directory)"):
        MetricsWriter(tmp_path, None, wandb=True)


def test_what_wandb_refuses_is_one_line(tmp_path, monkeypatch):
    wandb = mock.MagicMock(Error=ZeroDivisionError)  # any class of its own
    wandb.init.side_effect = ZeroDivisionError("api_key not configured\nmore")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(UserError, match=r"^W&B: api_key not configured; mend that, or set config\.wandb to False$"):
        MetricsWriter(tmp_path, None, wandb=True)
