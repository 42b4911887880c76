import json
import math
import struct
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from egrpo_jax.common.errors import UserError
from egrpo_jax.evaluation.statistics import paired_interval
from egrpo_jax.run.metrics import MetricsWriter, read_metrics
from egrpo_jax.run.timing import PhaseTimer, peak_device_memory, peak_flops


def write_run(workdir, resume_step, iterations):
    writer = MetricsWriter(workdir, resume_step)
    for iteration in iterations:
        writer.write(iteration, {"reward/hps/mean": iteration / 7, "loss": np.float32(iteration)})
    writer.close()


def tensorboard_points(workdir):
    """{(name, step): value} as TensorBoard shows it: a START record hides what came before with its step or later."""
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
    assert {step for _, step in tensorboard_points(tmp_path)} == {0}


def test_resuming_from_step_zero_keeps_it(tmp_path):
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


def test_files_that_cannot_be_used(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(UserError, match="no such file"):
        read_metrics(path)
    for line in ("garbage", "3", '{"loss": 1}'):
        path.write_text('{"iteration": 1}\n' + line + '\n{"iteration": 3}\n')
        with pytest.raises(UserError, match=r"metrics.jsonl, line 2: found"):
            read_metrics(path)
    path.write_text('{"iteration": 1}\n{"itera')
    assert read_metrics(path) == [{"iteration": 1}]
    with pytest.raises(UserError, match="cannot write"):
        MetricsWriter(path, None)


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'egrpo_jax\[wandb\]'"):
        MetricsWriter(tmp_path, None, wandb=True)


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    wandb = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for step in (None, 1):
        writer = MetricsWriter(tmp_path, step, wandb=True)
        writer.write(1, {"loss": 2.0})
        writer.close()
    first, second = wandb.init.call_args_list
    assert first == second
    assert first.kwargs["resume"] == "allow"
    run = wandb.init.return_value
    assert run.log.call_args_list == 2 * [mock.call({"loss": 2.0}, step=1)]
    assert run.finish.call_count == 2


def test_paired_interval_by_hand():
    # Differences 1, 2, 3, 6: mean 3, s^2 = 14/3, and t(3 degrees of freedom, 0.975) = 3.182446.
    mean, half = paired_interval([0, 0, 0, 0], np.array([1, 2, 3, 6]))
    assert mean == pytest.approx(3)
    assert half == pytest.approx(3.182446 * math.sqrt(14 / 3 / 4), rel=1e-6)
    mean, half = paired_interval([1.0], [3.0])
    assert mean == 2
    assert math.isnan(half)
    # A pair that lacks a value is left out.
    assert paired_interval([0, 0, 0, np.nan, 0, 0], [1, 2, 3, 9, 6, np.nan]) == paired_interval([0] * 4, [1, 2, 3, 6])
    assert np.isnan(paired_interval([np.nan], [1.0])).all()
    for before, after in (([], []), ([1], [1, 2]), ([[1]], [[1]])):
        with pytest.raises(ValueError, match="expected two arrays"):
            paired_interval(before, after)


def test_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(0)
    changes = 0.3 + generator.normal(size=(4000, 5))
    intervals = [paired_interval(np.zeros(5), change) for change in changes]
    covered = np.mean([abs(mean - 0.3) <= half for mean, half in intervals])
    assert abs(covered - 0.95) < 0.011  # three standard errors


def test_phases_add_up_and_start_anew(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 5.5, 7.0, 7.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    timer = PhaseTimer()
    for name in ("rollout", "update", "rollout"):
        with timer.phase(name):
            pass
    assert timer.take() == {"seconds/rollout": 1.25, "seconds/update": 0.5}
    assert timer.take() == {}


def test_a_phase_that_fails_is_timed():
    timer = PhaseTimer()
    with pytest.raises(RuntimeError), timer.phase("reward"):
        raise RuntimeError
    assert timer.take()["seconds/reward"] >= 0


def test_peak_memory(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    for stats, expected in (
        ([None], None),
        ([{"bytes_in_use": 1}], None),
        ([{"peak_bytes_in_use": 3}, {"peak_bytes_in_use": 5}], 5.0),
    ):
        monkeypatch.setattr(jax, "local_devices", lambda stats=stats: [Device(values) for values in stats])
        assert peak_device_memory() == expected


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None)],
)
def test_peak_of_known_chips(kind, peak):
    assert peak_flops(kind) == peak
